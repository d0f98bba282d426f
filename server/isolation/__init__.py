"""Cannot connect out: the network the process has, the kernel's filter on its system calls, and the watch over both."""
