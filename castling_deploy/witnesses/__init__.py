"""One file per runner of artefacts: see `castling_deploy.runner`."""
