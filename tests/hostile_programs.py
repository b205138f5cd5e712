"""Programs that try to break out of the sandbox, or to pass tests they do not pass.

Each one says ESCAPED when it got what it wanted. What the host puts in: VICTIM, the process
number of a bystander of the same user, and ADDRESS, a place in its memory; SECRET_FILE, a file of
the user with a secret in it; OUTSIDE, a folder of the user; TERMINAL, a terminal of the user;
TCP_PORT, UDP_PORT and ABSTRACT_SOCKET, where the user listens; SHARED_MEMORY, the number of a
segment of the user. The tests ask that `answer(3) == 9`.
"""

from __future__ import annotations

from textwrap import dedent

PRELUDE = """\
import contextlib, ctypes, os, signal, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
NUMBERS = {"x86_64": 0, "aarch64": 1}[os.uname().machine]
def number(x86_64, aarch64): return (x86_64, aarch64)[NUMBERS]
def map_pages(size, flags, file=-1):
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    pages = libc.mmap(None, size, 3, flags, file, 0)
    if pages == ctypes.c_void_p(-1).value: raise OSError(ctypes.get_errno(), "mmap")
    return pages
def unmap_pages(pages, size):
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.munmap(pages, size)
def answer(x): return None
"""

# What a program does to the machine.
DEEDS = {
    # ---- processes
    "fork_bomb": """
        while True:
            os.fork()
    """,
    "fork": """
        if os.fork() == 0:
            print("ESCAPED")
    """,
    "vfork_by_ctypes": """
        if NUMBERS == 0 and libc.syscall(58) == 0:
            os.write(1, b"ESCAPED"); os._exit(1)
    """,
    "clone_by_ctypes": """
        if libc.syscall(number(56, 220), 17, 0, 0, 0, 0) == 0:
            print("ESCAPED", flush=True); os._exit(1)
    """,
    "clone3_by_ctypes": """
        import struct
        arguments = struct.pack("11Q", 0, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0)
        if libc.syscall(435, arguments, 88) == 0:
            print("ESCAPED", flush=True); os._exit(1)
    """,
    "subprocess": """
        import subprocess
        print("ESCAPED", subprocess.check_output(["/bin/echo", "hello"]))
    """,
    "os_system": """
        if os.system("echo hello") == 0:
            print("ESCAPED")
    """,
    "exec": """
        os.execv("/bin/echo", ["echo", "ESCAPED"])
    """,
    "exec_of_memory": """
        file = os.memfd_create("x")
        os.write(file, open("/bin/echo", "rb").read())
        words = (ctypes.c_char_p * 3)(b"echo", b"ESCAPED", None)
        libc.syscall(number(322, 281), file, b"", words, None, 0x1000)
    """,
    "exec_of_a_descriptor": """
        file = os.open("/bin/echo", os.O_RDONLY)
        words = (ctypes.c_char_p * 3)(b"echo", b"ESCAPED", None)
        libc.syscall(number(322, 281), file, b"", words, None, 0x1000)
    """,
    "posix_spawn": """
        os.posix_spawn("/bin/echo", ["echo", "ESCAPED"], {})
        time.sleep(0.1)
    """,
    "multiprocessing": """
        import multiprocessing
        multiprocessing.Process(target=print, args=["ESCAPED"]).start()
    """,
    "daemon_of_a_daemon": """
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                print("ESCAPED", flush=True)
                time.sleep(20)
            os._exit(0)
    """,
    "daemon": """
        os.setsid()
        print("ESCAPED")
    """,
    "own_process_group": """
        os.setpgid(0, 0)
        print("ESCAPED")
    """,
    "thread_bomb": """
        threading.stack_size(1 << 16)
        while True:
            threading.Thread(target=time.sleep, args=[60]).start()
    """,
    "threads_that_do_not_end": """
        threads = [threading.Thread(target=time.sleep, args=[60]) for _ in range(4)]
        for thread in threads:
            thread.start()
    """,
    # ---- signals
    "kill_everything": """
        os.kill(-1, signal.SIGKILL)
    """,
    "kill_the_group": """
        os.killpg(0, signal.SIGKILL)
    """,
    "stop_the_group": """
        os.killpg(0, signal.SIGSTOP)
    """,
    "limit_the_parent": """
        import resource
        resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))
        print("ESCAPED")
    """,
    "kill_the_parent": """
        os.kill(os.getppid(), signal.SIGKILL)
    """,
    "kill_a_bystander": """
        os.kill(VICTIM, signal.SIGKILL)
    """,
    "kill_by_ctypes": """
        libc.syscall(number(62, 129), VICTIM, 9)
    """,
    "tgkill_by_ctypes": """
        libc.syscall(number(234, 131), VICTIM, VICTIM, 9)
    """,
    "queue_a_signal": """
        import struct
        # SI_QUEUE: the kernel takes no other code from a process
        libc.syscall(number(129, 138), VICTIM, 9, struct.pack("iii", 9, 0, -1) + bytes(116))
    """,
    "signal_through_a_pidfd": """
        signal.pidfd_send_signal(os.pidfd_open(VICTIM), signal.SIGKILL)
    """,
    "signal_through_a_file_owner": """
        import fcntl
        reader, writer = os.pipe()
        with contextlib.suppress(OSError):
            fcntl.fcntl(reader, 10, signal.SIGKILL)
        with contextlib.suppress(OSError):
            fcntl.fcntl(reader, 8, VICTIM)
        with contextlib.suppress(OSError):
            fcntl.fcntl(reader, fcntl.F_SETFL, 0x2000)
        os.write(writer, b"x")
    """,
    "ignore_all_signals": """
        for one in range(1, 65):
            with contextlib.suppress(OSError, ValueError):
                signal.signal(one, signal.SIG_IGN)
        while True:
            pass
    """,
    "catch_the_cpu_limit": """
        signal.signal(signal.SIGXCPU, lambda *_: None)
        while True:
            pass
    """,
    "alarm": """
        signal.alarm(1)
        while True:
            pass
    """,
    "renice_the_user": """
        os.setpriority(os.PRIO_PROCESS, VICTIM, 19)
        print("ESCAPED")
    """,
    "limit_a_bystander": """
        import resource
        resource.prlimit(VICTIM, resource.RLIMIT_NOFILE, (0, 0))
        print("ESCAPED")
    """,
    "pin_a_bystander": """
        os.sched_setaffinity(VICTIM, {0})
        print("ESCAPED")
    """,
    # ---- other processes' memory
    "ptrace": """
        if libc.syscall(number(101, 117), 0x4206, VICTIM, 0, 0) == 0:
            print("ESCAPED")
    """,
    "ptrace_the_parent": """
        if libc.syscall(number(101, 117), 0x4206, os.getppid(), 0, 0) == 0:
            print("ESCAPED")
    """,
    "read_the_parents_memory": """
        for line in open(f"/proc/{os.getppid()}/maps"):
            print("ESCAPED", line)
    """,
    "read_a_process_by_vm_readv": """
        buffer = ctypes.create_string_buffer(8)
        mine = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 8)
        theirs = (ctypes.c_void_p * 2)(ADDRESS, 8)
        if libc.syscall(number(310, 270), VICTIM, mine, 1, theirs, 1, ctypes.c_long(0)) > 0:
            print("ESCAPED")
    """,
    "write_to_a_process_by_vm_writev": """
        buffer = ctypes.create_string_buffer(8)
        mine = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 8)
        theirs = (ctypes.c_void_p * 2)(ADDRESS, 8)
        if libc.syscall(number(311, 271), VICTIM, mine, 1, theirs, 1, ctypes.c_long(0)) > 0:
            print("ESCAPED")
    """,
    "read_the_memory_file_of_a_process": """
        for process, place in ((os.getppid(), id(os)), (VICTIM, ADDRESS)):
            with contextlib.suppress(OSError), open(f"/proc/{process}/mem", "rb", 0) as memory:
                memory.seek(place)
                print("ESCAPED", memory.read(8))
    """,
    "descriptors_of_the_parent": """
        for i in range(64):
            with contextlib.suppress(OSError):
                file = os.open(f"/proc/{os.getppid()}/fd/{i}", os.O_RDWR | os.O_NONBLOCK)
                print("ESCAPED", file)
    """,
    "steal_a_descriptor": """
        if libc.syscall(438, libc.syscall(434, VICTIM, 0), 1, 0) >= 0:
            print("ESCAPED")
    """,
    "shared_memory_by_name": """
        if libc.syscall(number(29, 194), 4242, 4096, 0o1666) >= 0:
            print("ESCAPED")
    """,
    "delete_shared_memory_of_the_user": """
        if libc.syscall(number(31, 195), SHARED_MEMORY, 0, 0) == 0:
            print("ESCAPED")
    """,
    # ---- memory and disk
    "a_gigabyte": """
        data = bytearray(1 << 30)
        print("ESCAPED")
    """,
    "growing_list": """
        data = []
        while True:
            data.append(bytearray(1 << 20))
            assert len(data) < 512, print("ESCAPED")
    """,
    "big_integer": """
        x = 1 << 8_000_000_000
        print("ESCAPED")
    """,
    "deep_recursion": """
        sys.setrecursionlimit(10**9)
        def down(x): return down(x + 1)
        down(0)
    """,
    "memory_map": """
        import mmap
        mmap.mmap(-1, 1 << 30)
        print("ESCAPED")
    """,
    "memory_in_memfds": """
        files = [os.memfd_create("x") for _ in range(24)]
        for file in files:
            for _ in range(16):
                os.write(file, bytes(1 << 20))
        print("ESCAPED")
    """,
    "memory_in_shared_pages": """
        # What stays of each mapping is one page of address space, and all of the memory.
        for _ in range(6):
            pages = map_pages(64 << 20, 0x21)
            ctypes.memset(pages, 1, 64 << 20)
            unmap_pages(pages, (64 << 20) - 4096)
        print("ESCAPED")
    """,
    "memory_in_a_device": """
        file = os.open("/dev/zero", os.O_RDWR)
        for _ in range(6):
            pages = map_pages(64 << 20, 0x1, file)
            ctypes.memset(pages, 1, 64 << 20)
            unmap_pages(pages, (64 << 20) - 4096)
        print("ESCAPED")
    """,
    "memory_in_huge_pages": """
        # One small page of each, and the rest unmapped: so it matters that there are none.
        for _ in range(2):
            if libc.prctl(42, 0, 0, 0, 0) == 0:
                print("ESCAPED")
            libc.prctl(41, 0, 0, 0, 0)
    """,
    "memory_in_pipes": """
        # A pipe that is given one page of a huge one keeps all of it.
        size = 2 << 20
        for _ in range(24):
            reader, writer = os.pipe()
            for _ in range(8):
                pages = map_pages(2 * size, 0x22)
                huge = (pages + size - 1) // size * size
                libc.madvise(ctypes.c_void_p(huge), ctypes.c_size_t(size), 14)
                ctypes.memset(huge, 1, size)
                vector = (ctypes.c_void_p * 2)(huge, 4096)
                if libc.syscall(number(278, 75), writer, vector, 1, 0) < 0:
                    raise OSError(ctypes.get_errno(), "vmsplice")
                unmap_pages(pages, 2 * size)
        print("ESCAPED")
    """,
    "long_pipes": """
        import fcntl
        for _ in range(24):
            reader, writer = os.pipe()
            fcntl.fcntl(writer, 1031, 1 << 20)
        print("ESCAPED")
    """,
    "many_timers": """
        import struct
        for _ in range(2000):
            event, timer = struct.pack("QiiQQ", 0, 14, 1, 0, 0) + bytes(32), bytes(8)
            if libc.syscall(number(222, 107), 1, event, timer) != 0:
                raise OSError(ctypes.get_errno(), "timer_create")
        print("ESCAPED")
    """,
    "unlinked_open_files": """
        files = []
        for i in range(24):
            files.append(open(f"file{i}", "wb", 0))
            os.unlink(f"file{i}")
            for _ in range(16):
                files[-1].write(bytes(1 << 20))
        print("ESCAPED")
    """,
    "unlinked_mapped_files": """
        # A mapping keeps a file without a descriptor, and one page of it is enough.
        for i in range(96):
            with open(f"file{i}", "w+b", 0) as file:
                os.unlink(f"file{i}")
                for _ in range(4):
                    file.write(bytes(1 << 20))
                map_pages(4096, 0x2, file.fileno())
        print("ESCAPED")
    """,
    "replaced_open_files": """
        files = []
        for _ in range(24):
            files.append(open("new", "wb", 0))
            for _ in range(8):
                files[-1].write(bytes(1 << 20))
            os.replace("new", "old")
        print("ESCAPED")
    """,
    "nameless_files": """
        files = [os.open(".", os.O_TMPFILE | os.O_RDWR) for _ in range(24)]
        for file in files:
            for _ in range(16):
                os.write(file, bytes(1 << 20))
        print("ESCAPED")
    """,
    "files_in_a_folder_that_cannot_be_listed": """
        os.mkdir("closed", 0o300)
        for i in range(24):
            with open(f"closed/file{i}", "wb", 0) as file:
                for _ in range(16):
                    file.write(bytes(1 << 20))
        time.sleep(1)
        print("ESCAPED")
    """,
    "names_that_are_no_text": """
        for name in (b"\\xff\\n", b"-rf", b" ", b"\\x1b[2J"):
            os.mkdir(name)
            open(name + b"/" + name, "w").close()
    """,
    "raise_the_limits": """
        import resource
        for what in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_CORE):
            resource.setrlimit(what, (resource.RLIM_INFINITY,) * 2)
        print("ESCAPED")
    """,
    "core_dump": """
        libc.prctl(4, 1, 0, 0, 0)
        os.abort()
    """,
    "flush_all_disks": """
        for _ in range(3):
            if libc.syscall(number(162, 81)) == 0:
                print("ESCAPED")
    """,
    "one_big_file": """
        with open("big", "wb") as file:
            for _ in range(64):
                file.write(bytes(1 << 20))
                file.flush()
        print("ESCAPED")
    """,
    "many_files": """
        for i in range(200):
            with open(f"file{i}", "wb") as file:
                file.write(bytes(1 << 20))
        time.sleep(1)
        print("ESCAPED")
    """,
    "many_names": """
        for i in range(20_000):
            open(f"file{i}", "w").close()
        time.sleep(1)
        print("ESCAPED")
    """,
    "sparse_file": """
        with open("big", "wb") as file:
            file.truncate(1 << 40)
        print("ESCAPED")
    """,
    "deep_folders": """
        for i in range(20_000):
            os.mkdir("d"); os.chdir("d")
        print("ESCAPED")
    """,
    "folders_closed_to_their_owner": """
        os.makedirs("a/b")
        open("a/b/c", "w").close()
        os.chmod("a/b", 0); os.chmod("a", 0)
    """,
    "many_descriptors": """
        files = [open("/dev/null") for _ in range(1000)]
        print("ESCAPED")
    """,
    "many_pipes": """
        pipes = [os.pipe() for _ in range(1000)]
        print("ESCAPED")
    """,
    # ---- the network
    "tcp": """
        import socket
        socket.create_connection(("127.0.0.1", TCP_PORT), 1)
        print("ESCAPED")
    """,
    "udp": """
        import socket
        server = ("127.0.0.1", UDP_PORT)
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", server)
        print("ESCAPED")
    """,
    "socket_by_ctypes": """
        if libc.syscall(number(41, 198), 2, 1, 0) >= 0:
            print("ESCAPED")
    """,
    "unix_socket": """
        import socket
        socket.socket(socket.AF_UNIX).bind("there")
        print("ESCAPED")
    """,
    "abstract_unix_socket": """
        import socket
        socket.socket(socket.AF_UNIX).connect("\\0ABSTRACT_SOCKET")
        print("ESCAPED")
    """,
    "netlink": """
        import socket
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)
        print("ESCAPED")
    """,
    "name_service": """
        import socket
        print("ESCAPED", socket.getaddrinfo("example.org", 80))
    """,
    "io_uring": """
        if libc.syscall(425, 8, bytes(120)) >= 0:
            print("ESCAPED")
    """,
    "asynchronous_io": """
        if libc.syscall(number(206, 0), 8, bytes(8)) == 0:
            print("ESCAPED")
    """,
    # ---- files of the user and of the machine
    "read_the_home_folder": """
        # The way to the interpreter may show, nothing else.
        names = [name for name in os.listdir("HOME") if f"HOME/{name}" not in sys.base_prefix]
        print("ESCAPED" if names else "", names)
    """,
    "read_a_secret": """
        print("ESCAPED", open("SECRET_FILE").read())
    """,
    "read_a_secret_by_openat2": """
        how = (ctypes.c_uint64 * 3)(0, 0, 0)
        file = libc.syscall(437, -100, b"SECRET_FILE", how, 24)
        if file >= 0:
            print("ESCAPED", os.read(file, 100))
    """,
    "read_accounts": """
        print("ESCAPED", open("/etc/passwd").read())
    """,
    "read_the_environment": """
        print("ESCAPED" if "NANOCHAT_TEST_SECRET" in os.environ else "", dict(os.environ))
    """,
    "read_the_first_environment": """
        for process in ("self", os.getpid(), os.getppid(), 1, VICTIM):
            with contextlib.suppress(OSError):
                data = open(f"/proc/{process}/environ", "rb").read()
                print("ESCAPED" if b"NANOCHAT_TEST_SECRET" in data else "", data)
    """,
    "read_the_environment_of_libc": """
        pointer = (ctypes.POINTER(ctypes.c_char_p)).in_dll(libc, "environ")
        i = 0
        while pointer[i]:
            print("ESCAPED" if b"NANOCHAT_TEST_SECRET" in pointer[i] else "", pointer[i]); i += 1
    """,
    "list_processes": """
        print("ESCAPED", [name for name in os.listdir("/proc") if name.isdigit()])
    """,
    "write_outside": """
        open("OUTSIDE/planted", "w").write("x")
        print("ESCAPED")
    """,
    "write_to_tmp": """
        open("/tmp/nanochat_planted", "w").write("x")
        print("ESCAPED")
    """,
    "write_into_the_library": """
        import json
        open(json.__file__, "a").write("#")
        print("ESCAPED")
    """,
    "change_the_mode_of_the_library": """
        import json
        os.chmod(json.__file__, 0o666)
        print("ESCAPED")
    """,
    "touch_a_secret": """
        os.utime("SECRET_FILE", (0, 0))
        print("ESCAPED")
    """,
    "mark_a_secret": """
        os.setxattr("SECRET_FILE", "user.mark", b"x")
        print("ESCAPED")
    """,
    "truncate_a_secret": """
        os.truncate("SECRET_FILE", 0)
        print("ESCAPED")
    """,
    "truncate_a_secret_by_reading": """
        os.open("SECRET_FILE", os.O_RDONLY | os.O_TRUNC)
        print("ESCAPED")
    """,
    "open_a_secret_for_all": """
        os.chmod("SECRET_FILE", 0o666)
        print("ESCAPED")
    """,
    "create_in_a_folder_of_the_user": """
        os.mkdir("OUTSIDE/planted")
        print("ESCAPED")
    """,
    "write_below_with_dots": """
        open("../../../../../../../../OUTSIDE/planted", "w").write("x")
        print("ESCAPED")
    """,
    "watch_a_folder_of_the_user": """
        if libc.inotify_add_watch(libc.inotify_init1(0), b"OUTSIDE", 0xFFF) >= 0:
            print("ESCAPED")
    """,
    "size_of_a_secret": """
        print("ESCAPED", os.stat("SECRET_FILE").st_size)
    """,
    "compile_outside": """
        import json, py_compile
        py_compile.compile(json.__file__, cfile="OUTSIDE/planted", doraise=True)
        print("ESCAPED")
    """,
    "links_for_the_clean_up": """
        os.makedirs("a/b")
        for folder in (".", "a", "a/b"):
            os.symlink("SECRET_FILE", folder + "/file")
            os.symlink("OUTSIDE", folder + "/folder")
    """,
    "no_scratch_folder": """
        import shutil
        shutil.rmtree(os.getcwd(), ignore_errors=True)
        shutil.rmtree(os.path.dirname(os.getcwd()), ignore_errors=True)
    """,
    "symlink_out": """
        os.symlink("SECRET_FILE", "link")
        print("ESCAPED", open("link").read())
    """,
    "symlink_to_a_folder": """
        os.symlink("OUTSIDE", "link")
        open("link/planted", "w").write("x")
        print("ESCAPED")
    """,
    "hard_link_out": """
        os.link("SECRET_FILE", "link")
        print("ESCAPED", open("link").read())
    """,
    "delete_outside": """
        os.unlink("SECRET_FILE")
        print("ESCAPED")
    """,
    "rename_outside": """
        open("mine", "w").close()
        os.rename("mine", "SECRET_FILE")
        print("ESCAPED")
    """,
    "through_the_root_of_a_process": """
        for process in ("self", 1, os.getppid(), VICTIM):
            with contextlib.suppress(OSError):
                print("ESCAPED", open(f"/proc/{process}/root/SECRET_FILE").read())
    """,
    "through_the_working_folder_of_a_process": """
        for process in (1, os.getppid(), VICTIM):
            with contextlib.suppress(OSError):
                print("ESCAPED", os.listdir(f"/proc/{process}/cwd/"))
    """,
    "through_descriptors": """
        for i in range(3, 256):
            with contextlib.suppress(OSError):
                os.fchdir(i)
                print("ESCAPED", os.listdir("."))
    """,
    "out_of_the_root": """
        os.mkdir("x")
        os.chroot("x")
        print("ESCAPED")
    """,
    "mount": """
        if libc.mount(b"none", b".", b"tmpfs", 0, None) == 0:
            print("ESCAPED")
    """,
    "unmount": """
        if libc.umount2(b"/", 2) == 0:
            print("ESCAPED")
    """,
    "new_namespaces": """
        if libc.unshare(0x10000000) == 0:
            print("ESCAPED")
    """,
    "join_a_namespace": """
        for name in ("net", "mnt", "pid"):
            with contextlib.suppress(OSError):
                file = os.open(f"/proc/self/ns/{name}", os.O_RDONLY)
                if libc.setns(file, 0) == 0:
                    print("ESCAPED")
    """,
    "device_node": """
        os.mknod("disk", 0o60666, os.makedev(8, 0))
        print("ESCAPED")
    """,
    "kernel_memory": """
        print("ESCAPED", open("/dev/mem", "rb").read(1))
    """,
    "terminal": """
        print("ESCAPED", open("TERMINAL", "w").write("x"))
    """,
    "type_into_the_terminal": """
        import fcntl
        for i in range(3):
            with contextlib.suppress(OSError):
                fcntl.ioctl(i, 0x5412, b"x")
                print("ESCAPED")
    """,
    "become_root": """
        os.setuid(0)
        open("/etc/shadow")
        print("ESCAPED")
    """,
    "setuid_program": """
        open("tool", "wb").write(open("/bin/sh", "rb").read())
        os.chmod("tool", 0o4755)
        os.execv("./tool", ["tool", "-c", "echo ESCAPED"])
    """,
    "bpf": """
        import struct
        one_number = struct.pack("IIII", 2, 4, 4, 1)  # an array: size of a key, of a value, length
        if libc.syscall(number(321, 280), 0, one_number + bytes(112), 128) >= 0:
            print("ESCAPED")
    """,
    "performance_events": """
        import struct
        attributes = struct.pack("IIQ", 1, 112, 0) + bytes(24) + struct.pack("Q", 0x60) + bytes(64)
        if libc.syscall(number(298, 241), attributes, 0, -1, -1, 0) >= 0:
            print("ESCAPED")
    """,
    "page_faults": """
        if libc.syscall(number(323, 282), 1) >= 0:
            print("ESCAPED")
    """,
    "outlive_the_parent": """
        if libc.prctl(1, 0, 0, 0, 0) == 0:
            print("ESCAPED")
    """,
    "be_readable_for_others": """
        if libc.prctl(4, 1, 0, 0, 0) == 0:
            print("ESCAPED")
    """,
    "keys": """
        if libc.syscall(number(250, 219), 0, -4, 1) >= 0:
            print("ESCAPED")
    """,
    "file_handle": """
        if libc.syscall(number(303, 264), -100, b"/", bytes(128), bytes(8), 0) != -1:
            print("ESCAPED")
        if ctypes.get_errno() != 1:
            print("ESCAPED")
    """,
    "reboot": """
        libc.syscall(number(169, 142), 0xFEE1DEAD, 672274793, 0x4321FEDC, 0)
    """,
    "host_name": """
        if libc.sethostname(b"mine", 4) == 0:
            print("ESCAPED")
    """,
    "the_32_bit_table": """
        # getpid of the x32 table, where other numbers would get past the filter
        if NUMBERS == 0 and libc.syscall(0x40000000 + 39) > 0:
            print("ESCAPED")
    """,
    # ---- time, input, output
    "endless_loop": """
        while True:
            pass
    """,
    "long_sleep": """
        time.sleep(3600)
    """,
    "endless_output": """
        while True:
            print("x" * 10_000)
    """,
    "endless_errors": """
        while True:
            os.write(2, b"x" * 10_000)
    """,
    "one_endless_line": """
        while True:
            sys.stdout.write("x" * 10_000)
    """,
    "null_bytes": """
        print("\\0" * 100_000)
        raise ValueError("\\0")
    """,
    "closed_streams": """
        sys.stdout.close()
        sys.stderr.close()
    """,
    "output_that_is_no_text": """
        os.write(1, bytes(range(256)) * 100)
    """,
    "wait_for_input": """
        if input():
            print("ESCAPED")
    """,
    "close_all_descriptors": """
        os.closerange(0, 64)
        time.sleep(60)
    """,
    "crash": """
        ctypes.string_at(0)
    """,
}
# Ways to look right without being right.
FORGERIES = {
    "exit_code_0": """
        sys.exit(0)
    """,
    "os_exit_0": """
        os._exit(0)
    """,
    "os_exit_0_when_called": """
        def answer(x): os._exit(0)
    """,
    "system_exit_when_called": """
        def answer(x): raise SystemExit(0)
    """,
    "exit_hook": """
        import atexit
        atexit.register(lambda: os._exit(0))
    """,
    "equal_to_everything": """
        class Yes:
            def __eq__(self, other): return True
            __hash__ = None
        def answer(x): return Yes()
    """,
    "an_integer_equal_to_everything": """
        class Yes(int):
            def __eq__(self, other): return True
            def __ne__(self, other): return False
        def answer(x): return Yes(5)
    """,
    "a_list_equal_to_everything": """
        class Yes(list):
            def __eq__(self, other): return True
        def answer(x): return Yes()
    """,
    "a_false_index": """
        class Nine:
            shape = ()
            def item(self): return Yes()
        class Yes(float):
            def __eq__(self, other): return True
        def answer(x): return Nine()
    """,
    "asserts_that_do_not_raise": """
        import builtins
        class Quiet(Exception):
            def __new__(cls, *args): sys.exit(0)
        builtins.AssertionError = Quiet
    """,
    "replaced_builtins": """
        import builtins
        builtins.compile = lambda *args, **named: (lambda: None).__code__
        builtins.exec = lambda *args: None
        builtins.__import__ = None
    """,
    "a_trace_that_skips_lines": """
        def trace(frame, event, argument):
            if event == "line":
                with contextlib.suppress(ValueError):
                    frame.f_lineno += 1
            return trace
        sys.settrace(trace)
        threading.settrace(trace)
    """,
    "nonce_from_the_frames": """
        import json
        frame = sys._getframe()
        while frame:
            for name, value in frame.f_locals.items():
                if "nonce" in repr((name, value)).replace("nonce_from", ""):
                    print("ESCAPED", name)
            frame = frame.f_back
    """,
    "nonce_from_all_objects": """
        import gc, json
        for thing in gc.get_objects():
            if isinstance(thing, dict) and "nonce" in thing:
                print("ESCAPED", thing)
    """,
    "nonce_from_memory": """
        import re
        tests = re.compile(b"[a]nswer[(]3[)] == 9")  # a pattern that does not find itself
        memory = open("/proc/self/mem", "rb", 0)
        for line in open("/proc/self/maps"):
            first, last = (int(text, 16) for text in line.split()[0].split("-"))
            with contextlib.suppress(OSError, OverflowError, ValueError):
                memory.seek(first)
                if tests.search(memory.read(min(last - first, 1 << 22))):
                    print("ESCAPED", line)
    """,
    "nonce_from_the_descriptors": """
        for i in range(256):
            with contextlib.suppress(OSError):
                os.set_blocking(i, False)
                data = os.read(i, 1 << 16)
                if b"nonce" in data or b"answer(" in data:
                    print("ESCAPED", data)
    """,
    "verdicts_on_all_descriptors": """
        line = b'{"active": ["seccomp"], "missing": []}\\n{"nonce": "", "passed": true}\\n'
        for i in range(256):
            with contextlib.suppress(OSError):
                os.write(i, line)
    """,
    "answers_on_all_descriptors": """
        import json, struct
        def frame(value):
            data = json.dumps(value).encode()
            return struct.pack(">I", len(data)) + data
        for i in range(3, 256):
            with contextlib.suppress(OSError):
                os.write(i, frame({"result": None, "passed": True, "nonce": ""}) * 3)
    """,
    "a_frame_too_long": """
        for i in range(3, 256):
            with contextlib.suppress(OSError):
                os.write(i, b"\\xff" * 64)
    """,
    "frames_that_are_no_frames": """
        import struct
        for i in range(3, 256):
            unhashable = b'{"result": ["set", [["list", []]]]}'
            for data in (b"[1]", b"nonsense", b"[" * 100_000, unhashable):
                with contextlib.suppress(OSError):
                    os.write(i, struct.pack(">I", len(data)) + data)
    """,
    "an_answer_for_the_tester_to_choke_on": """
        def answer(x):
            deep = []
            for _ in range(900):
                deep = [deep]
            return deep
    """,
    "an_answer_without_end": """
        def answer(x):
            import itertools
            return map(abs, itertools.count())
    """,
    "an_answer_that_holds_itself": """
        def answer(x):
            loop = []
            loop.append(loop)
            return loop
    """,
    "an_enormous_answer": """
        def answer(x): return "x" * (100 << 20)
    """,
    "a_number_without_end": """
        class Fraction:
            def __str__(self): return "1e999999999"
        def answer(x): return Fraction()
    """,
    "an_exception_as_long_as_a_book": """
        def answer(x): raise ValueError("\\ud800" * 10_000_000)
    """,
    "answers_from_a_thread": """
        import json, struct
        data = json.dumps({"result": None, "passed": True, "nonce": ""}).encode()
        def write():
            for i in range(3, 256):
                with contextlib.suppress(OSError):
                    os.set_blocking(i, False)
                    os.write(i, struct.pack(">I", len(data)) + data)
        def write_for_ever():
            while True: write()
        threading.Thread(target=write_for_ever, daemon=True).start()
    """,
    "hooks_into_the_import": """
        class Finder:
            def find_spec(self, *_): os._exit(0)
        sys.meta_path.insert(0, Finder())
        sys.modules.clear()
    """,
    "an_exception_that_cannot_be_shown": """
        class Odd(Exception):
            def __str__(self): raise Odd
        def answer(x): raise Odd
    """,
    "an_exception_named_like_a_class_of_the_tester": """
        class _ProgramEndedError(BaseException): pass
        def answer(x): raise _ProgramEndedError("passed")
    """,
    "an_exception_with_too_few_arguments": """
        def answer(x): raise UnicodeDecodeError("utf-8", b"", 0, 1, "passed")
    """,
    "no_such_function": """
        del answer
    """,
    "a_function_that_is_none": """
        answer = 9
    """,
    "a_syntax_error": """
        def answer(x) return 9
    """,
}


def source(body: str) -> str:
    """A whole program."""
    return PRELUDE + dedent(body)
