"""Which mesh: all that a model, a batch and a number of devices admit, drafted by arithmetic, the best compiled.

    drafts = draft_meshes(target.devices, describe)     # every admissible mesh; nothing is compiled
    search = compile_best(drafts, compile_plan, keep=6, progress=show)
    search.best, search.table(...)

The two functions handed in are the caller's, one pair for a training step and one for inference:

    describe(mesh: dict[str, int]) -> Draft         raises ShardingError where the mesh does not divide
    compile_plan(mesh: dict[str, int]) -> Plan      the real compiler
"""
