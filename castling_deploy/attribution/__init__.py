"""Preprocessing or model? Somebody's own pictures beside ours, and which known mistake explains the difference."""
