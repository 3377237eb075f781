"""Speed, memory and accuracy of fastpref and of its peers, on the same inputs.

workloads.py   heads and batches to measure on, and their inputs
peers.py       one function a way to compute the same DPO loss
timing.py      seconds on a device, interleaved
measure.py     time, peak memory, error against float64
suite.py       what a run measures, part after part
steps.py       whole training steps beside TRL's trainer
trainer.py     whole training steps on pairs of uneven lengths, padded, packed and shared
report.py      tables, here and in the README; comparison with an earlier run
charts.py      pictures and the JSON file
"""
