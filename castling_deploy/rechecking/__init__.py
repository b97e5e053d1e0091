"""An artefact folder looked at after its export: hashed, read back, run again, judged by other limits, compared."""
