"""The self-tests of an artefact as texts: templates of this folder, with the facts of the artefact in their place."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from castling_deploy.selftests.facts import Facts
from castling_deploy.selftests.languages import LANGUAGES

TEMPLATES = Path(__file__).parent / "templates"
PYTHON = "selftest.py"

HOW = {
    ".py": "`python selftest/{name} .` in the artefact's folder, with numpy and the artefact's runtime",
    ".cpp": "`g++ -std=c++17 -O2 selftest/{name} -I ORT/include -L ORT/lib -lonnxruntime -o /tmp/selftest`, then "
    "`/tmp/selftest .`; ORT is an unpacked release of ONNX Runtime",
    ".swift": "`swiftc -O -parse-as-library selftest/{name} -o /tmp/selftest`, then `/tmp/selftest .`, on macOS 14 or "
    "later; or `check(folder)` in an app. **Never run where it was written: there was no Mac**",
    ".kt": "`{name}`: `Selftest.run(folder)` in an instrumented test on Android. **Never run where it was written: "
    "there was no device**",
}

README = """\
# Self-tests

Each program runs the images of `golden/` through the artefact with a runtime of its platform, and compares with what
PyTorch said of them. The error on an image is the largest difference of an output, divided by the spread of that
output (how far the golden outputs of different images lie apart); the limit is that of `castling verify`. They print
a line per output and `PASS` or `FAIL`. Build outside the artefact's folder: `castling verify` names every file that
was added.

{how}
"""


def texts(templates: Mapping[str, str], facts: Facts) -> dict[str, str]:
    """File name in selftest/ -> content. `templates` are the target's: file name -> template, where a template for
    selftest.py is only the part that runs the model."""
    made = {
        name: with_facts(composed(name, template), facts, Path(name).suffix) for name, template in templates.items()
    }
    how = "\n".join(f"- {HOW[Path(name).suffix].format(name=name)}." for name in templates)
    return {**made, "README.md": README.format(how=how)}


def composed(name: str, template: str) -> str:
    """The template; of a Python one, the frame that all targets share with its runtime in it."""
    text = (TEMPLATES / template).read_text(encoding="utf-8")
    if name != PYTHON:
        return text
    return replaced((TEMPLATES / PYTHON).read_text(encoding="utf-8"), "runtime", section(text, "runtime"))


def with_facts(text: str, facts: Facts, suffix: str) -> str:
    return replaced(text, "facts", LANGUAGES[suffix](facts))


def section(text: str, name: str) -> str:
    """What stands between the lines `<name>` and `</name>`, comments of any language."""
    match = _between(name).search(text)
    assert match is not None, f"the template has no section {name}"
    return match[1]


def replaced(text: str, name: str, content: str) -> str:
    """`text` with `content` in the place of the section, the marking lines gone."""
    assert _between(name).search(text) is not None, f"the template has no section {name}"
    return _between(name).sub(lambda match: content.strip("\n") + "\n", text)


def _between(name: str) -> re.Pattern[str]:
    return re.compile(rf"^(?:#|//) <{name}>\n(.*?)^(?:#|//) </{name}>\n", re.MULTILINE | re.DOTALL)
