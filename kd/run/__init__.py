"""What a training run needs around its loop: arguments, folder, checkpoints, processes and signals.

The losses are computed in kd/distiller.py and kd/methods/.

Interruption: Ctrl-C and SIGTERM finish the step, save a checkpoint and print the command that continues; during the
last evaluation they finish the run. A killed run continues with --resume from its last checkpoint, at most ten minutes
old; --resume auto also starts a run that does not exist yet, for job queues that restart. Random numbers follow from
seed, step and process, so on a CPU the continued run ends with the same student, bit for bit. Arguments, number of
processes, annotations, number of images that can be read and teacher must not have changed. Several machines share the
folder of the run.

Bad data is reported before training starts, see `kd.data.CocoFolder`. A loss or gradient that is not finite stops the
run before the optimizer step; the message names terms, iteration and images, and nonfinite.json keeps them.
"""
