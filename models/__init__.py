"""Castling networks: one file per family."""
