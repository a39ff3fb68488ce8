# SPDX-License-Identifier: MIT
"""A pretrained softmax transformer in, a hybrid with linear attention out: `fla linearize`.

`surgery.py` carries weights over, `calibrate.py` sets gates from the teacher's attention,
`align.py` regresses every layer on its teacher's, `select.py` chooses which layers stay softmax,
`distill.py` trains the whole, `export.py` writes it, `run.py` does all of it and resumes where it
stopped.
"""
