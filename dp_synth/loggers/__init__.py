"""Loggers: CSV, TensorBoard, Weights & Biases. They are told of a run once, when it is done.

The gate of a private phase is ``dp_synth.privacy.silence``: what it does not let through is in no
file that loggers read. No logger is open while that phase trains, and none is connected to it: what
is told is read from the run directory afterwards, by name (``record.read_record``). So nothing that
a callback, a ``self.log`` or a print of that phase says can reach a logger; and no row carries the time of a
step, which would follow the size of its batch: all rows are written at one moment. The eps curve
is computed from the plan.
"""
