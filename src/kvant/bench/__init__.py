"""How fast kvant is: workloads through the engine, and kernels beside the machine's ceilings."""
