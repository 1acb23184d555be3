"""One run: a model trained step by step, kept on disk and resumed bit for bit.

`engine` is the whole of it. `arm` and `session` make what it needs, `order` says which samples a step sees, `trainer`
takes the step, `evaluate` measures, `checkpoint`, `folder` and `log` keep what there is, `processes` shares it out.
"""
