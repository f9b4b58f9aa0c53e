"""Child processes: work that can be stopped, and that has limits.

isolated  a function called in a process of its own, with limits of time and memory
child     a process that can be stopped: at a deadline, at Ctrl-C, with its parent
"""
