"""The facts of an artefact as constants of each language that has a self-test."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping

from castling_deploy.selftests.facts import Facts


def quoted(text: str) -> str:
    """A string literal that Python, C++, Swift and Kotlin read alike: names of files and tensors have no $ or \\."""
    return json.dumps(text)


def listed(items: Iterable[str]) -> str:
    return ", ".join(items)


def python(facts: Facts) -> str:
    golden = "".join(
        f"    ({quoted(each.name)}, {quoted(each.file)}, {list(each.spreads)!r}, {each.limit!r}),\n"
        for each in facts.golden
    )
    return (
        f"MODEL = {quoted(facts.model)}\n"
        f"INPUT = {quoted(facts.input)}\n"
        f"IMAGE_INPUT = {facts.content == 'image'}  # whether the model takes uint8 pixels and normalises them itself\n"
        f"DTYPE = {quoted(facts.dtype)}\n"
        f"BATCH = {facts.batch}  # images at once; -1: any number\n"
        f"MEAN, STD = {list(facts.mean)!r}, {list(facts.std)!r}\n"
        f"OUTPUTS = [{listed(map(quoted, facts.outputs))}]\n"
        "# name, file in golden/, spread of each golden image's output, largest rel\n"
        f"GOLDEN: list[tuple[str, str, list[float], float]] = [\n{golden}]\n"
    )


def cpp(facts: Facts) -> str:
    golden = "".join(
        f"    {{{quoted(each.name)}, {quoted(each.file)}, {{{listed(map(repr, each.spreads))}}}, {each.limit!r}}},\n"
        for each in facts.golden
    )
    return (
        f"const char* const kModel = {quoted(facts.model)};\n"
        f"const char* const kInput = {quoted(facts.input)};\n"
        f"const std::int64_t kBatch = {facts.batch};  // images at once; -1: any number\n"
        f"const std::vector<float> kMean = {{{listed(map(repr, facts.mean))}}};\n"
        f"const std::vector<float> kStd = {{{listed(map(repr, facts.std))}}};\n"
        f"const std::vector<Golden> kGolden = {{\n{golden}}};\n"
    )


def swift(facts: Facts) -> str:
    golden = "".join(
        f"    Golden(name: {quoted(each.name)}, file: {quoted(each.file)}, "
        f"spreads: [{listed(map(repr, each.spreads))}], limit: {each.limit!r}),\n"
        for each in facts.golden
    )
    return (
        f"let modelFile = {quoted(facts.model)}\n"
        f"let inputName = {quoted(facts.input)}\n"
        f"let takesPixels = {str(facts.content == 'image').lower()}  // the model normalises them itself\n"
        f"let batch = {facts.batch}\n"
        f"let mean: [Float] = [{listed(map(repr, facts.mean))}]\n"
        f"let std: [Float] = [{listed(map(repr, facts.std))}]\n"
        f"let goldenOutputs = [\n{golden}]\n"
    )


def kotlin(facts: Facts) -> str:
    golden = "".join(
        f"    Golden({quoted(each.name)}, {quoted(each.file)}, doubleArrayOf({listed(map(repr, each.spreads))}), "
        f"{each.limit!r}),\n"
        for each in facts.golden
    )
    return (
        f"private const val MODEL = {quoted(facts.model)}\n"
        f"private const val BATCH = {facts.batch}\n"
        f"private val MEAN = floatArrayOf({listed(f'{value!r}f' for value in facts.mean)})\n"
        f"private val STD = floatArrayOf({listed(f'{value!r}f' for value in facts.std)})\n"
        f"private val OUTPUTS = listOf({listed(map(quoted, facts.outputs))})  // in the order of the model\n"
        f"private val GOLDEN = listOf(\n{golden})\n"
    )


LANGUAGES: Mapping[str, Callable[[Facts], str]] = {".py": python, ".cpp": cpp, ".swift": swift, ".kt": kotlin}
