"""Peers that copy files and trees."""

from __future__ import annotations

import getpass
import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence

from ..contender import ARRIVED, Contender, Job, Servers, Work, first_line, path_of
from ..errors import RunError
from ..processes import free_port, unprivileged


class Cp(Contender):
    """The ceiling: no network, no process to talk to."""

    name = "cp"
    programs = ("cp",)
    how_to_get = "apt-get install coreutils"

    def version(self) -> str:
        return first_line("cp", "--version")

    def serve(self, job: Job, servers: Servers) -> None:
        pass

    def commands(self, job: Job, servers: Servers) -> Sequence[Sequence[str]]:
        return [["cp", "-a", str(job.source), str(job.arrived)]]


class GridFtp(Contender):
    """With ``streams`` parallel connections for a file; a tree goes with four files at a time."""

    programs = ("globus-gridftp-server", "globus-url-copy")
    how_to_get = "apt-get install globus-gridftp-server-progs globus-gass-copy-progs"

    def __init__(self, streams: int = 1) -> None:
        self._streams = streams
        self.name = f"GridFTP -p {streams}"

    def version(self) -> str:
        return f"{first_line(path_of(self.programs[0]), '-version')}; {first_line('globus-url-copy', '-version')}"

    def serve(self, job: Job, servers: Servers) -> None:
        port, user = free_port(), unprivileged()
        servers.start_listening(
            [path_of("globus-gridftp-server"), "-aa", "-anonymous-user", user or getpass.getuser(), "-home-dir", "/",
             "-p", str(port), "-data-interface", "127.0.0.1", "-control-interface", "127.0.0.1", "-no-detach",
             "-daemon"],
            port,
            user=user,
        )  # fmt: skip

    def commands(self, job: Job, servers: Servers) -> Sequence[Sequence[str]]:
        source, target = f"file://{job.source}", f"ftp://127.0.0.1:{servers.ports[0]}{job.arrived}"
        if job.work is Work.TREE:
            return [["globus-url-copy", "-q", "-fast", "-r", "-cd", "-cc", "4", f"{source}/", f"{target}/"]]
        return [["globus-url-copy", "-q", "-fast", "-p", str(self._streams), source, target]]


class Rclone(Contender):
    """It pulls: rclone serves the source over HTTP, and copies from there."""

    name = "rclone"
    programs = ("rclone",)
    how_to_get = "apt-get install rclone"

    def version(self) -> str:
        return first_line("rclone", "version")

    def environment(self, job: Job) -> Mapping[str, str]:
        config = job.scratch / "rclone.conf"
        config.touch()
        return {"RCLONE_CONFIG": str(config), "RCLONE_CACHE_DIR": str(job.scratch)}

    def serve(self, job: Job, servers: Servers) -> None:
        port = free_port()
        served = job.source if job.work is Work.TREE else job.source.parent
        servers.start_listening(
            ["rclone", "serve", "http", "--addr", f"127.0.0.1:{port}", "--read-only", str(served)],
            port,
            env=self.environment(job),
        )

    def commands(self, job: Job, servers: Servers) -> Sequence[Sequence[str]]:
        remote = ["--http-url", f"http://127.0.0.1:{servers.ports[0]}", "--ignore-checksum"]
        if job.work is Work.TREE:
            return [["rclone", "copy", *remote, ":http:", str(job.arrived), "--transfers", "16"]]
        streams = ["--multi-thread-streams", "4", "--multi-thread-cutoff", "64M"]
        return [["rclone", "copyto", *remote, *streams, f":http:{job.source.name}", str(job.arrived)]]


class Rsync(Contender):
    """The daemon, without ssh; whole files."""

    name = "rsync daemon"
    programs = ("rsync",)
    how_to_get = "apt-get install rsync"

    def version(self) -> str:
        return first_line("rsync", "--version")

    def serve(self, job: Job, servers: Servers) -> None:
        port = free_port()
        config = job.scratch / "rsyncd.conf"
        user = [] if os.geteuid() else ["uid = 0", "gid = 0"]
        lines = [
            f"port = {port}",
            "address = 127.0.0.1",
            "use chroot = no",
            "[d]",
            f"path = {job.target}",
            "read only = no",
        ]
        config.write_text("\n".join([*lines, *user, ""]))
        servers.start_listening(["rsync", "--daemon", "--no-detach", f"--config={config}"], port)

    def commands(self, job: Job, servers: Servers) -> Sequence[Sequence[str]]:
        url = f"rsync://127.0.0.1:{servers.ports[0]}/d/{ARRIVED}"
        if job.work is Work.TREE:
            return [["rsync", "-a", "-W", "--inplace", f"{job.source}/", f"{url}/"]]
        return [["rsync", "-W", "--inplace", str(job.source), url]]


class XRootD(Contender):
    """With eight streams. The server does not run as root."""

    name = "xrdcp -S 8"
    programs = ("xrootd", "xrdcp")
    how_to_get = "apt-get install xrootd-server xrootd-client"

    def version(self) -> str:
        return first_line("xrdcp", "--version")

    def serve(self, job: Job, servers: Servers) -> None:
        port, admin = free_port(), job.scratch / "xrootd"
        admin.mkdir()
        admin.chmod(0o777)
        config = job.scratch / "xrootd.cfg"
        config.write_text(
            f"all.export {job.target}\nall.adminpath {admin}\nall.pidpath {admin}\nxrd.port {port}\nxrd.network nodnr\n"
        )
        servers.start_listening(
            ["xrootd", "-c", str(config), "-l", str(admin / "log")], port, user=unprivileged(), env={"HOME": str(admin)}
        )

    def commands(self, job: Job, servers: Servers) -> Sequence[Sequence[str]]:
        return [
            [
                "xrdcp",
                "-f",
                "-s",
                "-N",
                "-S",
                "8",
                str(job.source),
                f"root://127.0.0.1:{servers.ports[0]}/{job.arrived}",
            ]
        ]


class Scp(Contender):
    """Its own sshd with keys made for the run; the fastest cipher."""

    name = "scp"
    programs = ("sshd", "scp", "ssh-keygen")
    how_to_get = "apt-get install openssh-server openssh-client"

    def version(self) -> str:
        return first_line("ssh", "-V")

    def serve(self, job: Job, servers: Servers) -> None:
        port, place = free_port(), job.scratch
        for name in ("host", "user"):
            done = subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(place / name)],
                capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
            )  # fmt: skip
            if done.returncode:
                raise RunError(f"ssh-keygen ended with {done.returncode}: {done.stderr.strip()}")
        config = place / "sshd_config"
        config.write_text(
            f"Port {port}\nListenAddress 127.0.0.1\nHostKey {place / 'host'}\n"
            f"AuthorizedKeysFile {place / 'user.pub'}\nPidFile none\nStrictModes no\nUsePAM no\n"
            "PermitRootLogin prohibit-password\nSubsystem sftp internal-sftp\n"
        )
        sshd = [path_of("sshd"), "-D", "-e", "-f", str(config)]
        if os.geteuid() == 0 and not os.path.isdir("/run/sshd"):
            # As root it insists on this directory, which the service's start would make: give it one that only it sees.
            script = f"mount -t tmpfs none /run && mkdir -m 755 /run/sshd && exec {shlex.join(sshd)}"
            sshd = ["unshare", "--mount", "sh", "-c", script]
        servers.start_listening(sshd, port)

    def commands(self, job: Job, servers: Servers) -> Sequence[Sequence[str]]:
        known = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "IdentitiesOnly=yes"]
        options = ["-q", "-F", "none", "-c", "aes128-gcm@openssh.com", "-P", str(servers.ports[0]), *known]
        return [["scp", *options, "-i", str(job.scratch / "user"), "-rp", str(job.source), f"127.0.0.1:{job.arrived}"]]
