"""Speed, measured: run a file with `python -m benchmarks.NAME`."""
