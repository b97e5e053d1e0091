"""Exporters: one file per target. Importing one imports no toolchain."""

from castling_deploy.verbs import make_callable

make_callable(__name__)
