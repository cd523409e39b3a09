"""Connect processes and devices: the mesh, arrays on hosts, preemption and failures."""
