"""Programs that travel inside an artefact's folder and check it with its platform's runtime."""
