"""Tasks run through the server: quality, depth and speed at full and at retrieved depth."""
