"""Reading checkpoints: what trainers, wrappers and hubs put around the tensors, and never their code."""
