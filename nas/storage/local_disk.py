"""Refuse folders on network file systems: SQLite's write-ahead log needs shared memory.

See https://www.sqlite.org/wal.html, "all processes using a database must be on the same host".
"""

from pathlib import Path

from nas.errors import NetworkFileSystemError

MOUNTS = Path("/proc/self/mounts")  # other systems have no such file: nothing is refused there
NETWORK = {"9p", "afs", "beegfs", "ceph", "cifs", "coda", "glusterfs", "gpfs", "lustre", "ncpfs"}
NETWORK |= {"nfs", "nfs3", "nfs4", "ocfs2", "smb3", "smbfs"}
# A FUSE file system is served by a program, mostly from a network or a bucket; these are local.
LOCAL_FUSE = {"bindfs", "encfs", "fuse-overlayfs", "gocryptfs", "lxcfs", "mergerfs", "unionfs"}


def check_local(path: Path) -> None:
    """Raise NetworkFileSystemError if the file would be on a network file system."""
    kind, mount = _mount(path)
    family, _, program = kind.partition(".")
    is_remote_fuse = family == "fuse" and program not in LOCAL_FUSE  # `fuse`: any program
    if kind in NETWORK or is_remote_fuse:
        raise NetworkFileSystemError(
            f"{path} is on a network file system ({kind}, mounted at {mount}), where SQLite can "
            "lose data: give a folder on a local disk, and copy that folder when the search is over"
        )


def _mount(path: Path) -> tuple[str, str]:
    """Return type and mount point of the file system that a path is on."""
    try:
        lines = MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "", ""
    best = ("", "")
    ancestors = {str(folder) for folder in (path.resolve(), *path.resolve().parents)}
    for line in lines:
        _, mount, kind, *_ = line.split(" ")
        mount = mount.replace("\\040", " ")
        if mount in ancestors and len(mount) >= len(best[1]):
            best = (kind, mount)
    return best
