"""8-bit artefacts: ranges from calibration images, what stays in float, and the reference to verify by."""
