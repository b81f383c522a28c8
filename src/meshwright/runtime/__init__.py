"""Run a layout: the only home of torch, beside ``verify``.

Parameters, activations and gradients are local tensors; where a part lies in the whole is a
``Place``. Groups are passed as arguments and never stored in globals.
"""
