"""`megatron-et check`: will this training command run with Expert Threshold routing, here?

Nothing is trained and nothing is written. What imports other people's packages runs in child processes
(child.py), so that an import that crashes or hangs is one line of the answer and not the end of it.

| file | what it finds out |
| --- | --- |
| packages.py | versions of torch, Transformer Engine, Apex, DeepEP |
| plugin.py | which Megatron, which seams bind |
| flags.py | what this package and Megatron say of the flags |
| layers.py, sizes.py | routers of each pipeline stage; bytes of their statistics |
| command.py | the command; findings.py prints them |
"""
