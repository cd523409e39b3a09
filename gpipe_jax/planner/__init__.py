"""Plan a run with the real TPU compiler, before renting a pod.

accelerators -> compiled -> compiler (a process of its own: compile_child)
job -> programs -> compute (with memory and timing) -> report
                   searching -> planner (what users call)
"""
