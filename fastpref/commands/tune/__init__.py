"""`fastpref tune`: which launch configurations, and who multiplies, are fastest on this GPU.

questions.py says what may differ and gives the work that shows it, run.py measures and writes files
that `fastpref_kernels` reads. Nothing here needs rich or typer: `bench/on_gpu.py` runs it too.
"""
