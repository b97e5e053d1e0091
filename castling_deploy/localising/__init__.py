"""Where an artefact goes wrong: the first operator that leaves the limit, its cause, and a folder that shows it."""
