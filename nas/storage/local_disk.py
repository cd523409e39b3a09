"""Whether a folder is on a local disk: SQLite's write-ahead log needs memory that is shared.

See https://www.sqlite.org/wal.html, "all processes using a database must be on the same host".
"""

from pathlib import Path

from nas.errors import NetworkFileSystemError

MOUNTS = Path("/proc/self/mounts")  # Linux; elsewhere nothing is known, and nothing refused
NETWORK = {"9p", "afs", "beegfs", "ceph", "cifs", "coda", "glusterfs", "gpfs", "lustre", "ncpfs"}
NETWORK |= {"nfs", "nfs3", "nfs4", "ocfs2", "smb3", "smbfs"}
# A program serves it: mostly from a network, such as drives and buckets; these are not.
LOCAL_FUSE = {"bindfs", "encfs", "fuse-overlayfs", "gocryptfs", "lxcfs", "mergerfs", "unionfs"}


def check_local(path: Path) -> None:
    """Raise NetworkFileSystemError if the file would be on a network file system."""
    kind, mount = _mount(path)
    family, _, program = kind.partition(".")
    served = family == "fuse" and program not in LOCAL_FUSE  # plain `fuse` is any program's
    if kind in NETWORK or served:
        raise NetworkFileSystemError(
            f"{path} is on a network file system ({kind}, mounted at {mount}), where SQLite can "
            "lose data: give a folder on a local disk, and copy that folder when the search is over"
        )


def _mount(path: Path) -> tuple[str, str]:
    """Type and place of the file system that a path is on."""
    try:
        lines = MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "", ""
    best = ("", "")
    places = {str(place) for place in (path.resolve(), *path.resolve().parents)}
    for line in lines:
        _, mount, kind, *_ = line.split(" ")
        mount = mount.replace("\\040", " ")
        if mount in places and len(mount) >= len(best[1]):
            best = (kind, mount)
    return best
