"""`megascale verify`: before GPU hours are spent on a layout, show that its outputs and gradients are right.

Every layout that fits N ranks runs a whole training step of a small model with the peculiarities of the user's own,
in FP32, and is compared with the plain model on one device.

    scale         the small model
    layouts       which layouts: all that fit, as a covering
    batch         packed documents, missing targets
    reference     the plain model under autograd, and the one-rank list with all its tensors
    rank          one layout on one rank: the step that training runs, and its errors
    expected      which part of the single rank's tensors each declared value should be
    explain       the first operator whose result differs
    command       ranks, progress, results; report: what people and programs read
"""
