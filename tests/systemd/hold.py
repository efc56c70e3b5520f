import ctypes, os, sys

PTRACE_SEIZE, PTRACE_INTERRUPT, WALL = 0x4206, 0x4207, 0x40000000
main = int(sys.argv[1])
for thread in map(int, os.listdir(f"/proc/{main}/task")):
    if thread != main:
        for request in (PTRACE_SEIZE, PTRACE_INTERRUPT):
            if ctypes.CDLL(None).ptrace(request, thread, None, None) != 0:
                sys.exit("it cannot be held")
# Holds them until they end.
try:
    while True:
        os.waitpid(-1, WALL)
except ChildProcessError:
    pass
