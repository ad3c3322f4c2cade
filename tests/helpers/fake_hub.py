"""A local mock Hub for huggingface_hub's real client: model repos and Spaces with commits, in memory."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


# Files that go through Git LFS, as the Hub's default .gitattributes has it.
LFS_SUFFIXES = (".safetensors", ".png", ".jpg", ".bin")


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repo:
    """Commits in their order, each the whole tree: file contents by path."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: bool = False

    def commit(self, tree: dict[str, bytes]) -> str:
        oids = sorted((path, git_oid(content)) for path, content in tree.items())
        commit = hashlib.sha1(repr((len(self.commits), oids)).encode()).hexdigest()
        self.commits[commit] = tree
        return commit

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch or commit; None if there is none."""
        if revision == "main":
            return list(self.commits)[-1]
        return revision if revision in self.commits else None


class Hub:
    """
    The server, as a context manager.

    Attributes:
        address: The value for `HF_ENDPOINT`.
        repos: By name.
        downloads: For each GET of a file's content, its path and its `Range` header, if any.
        before_content: Called with a path before its content is sent; returns the number of bytes after which the
            connection breaks, or None.
    """

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.downloads: list[tuple[str, str | None]] = []
        self.before_content: Callable[[str], int | None] = lambda path: None
        hub = self

        class Handler(HubHandler):
            server_hub = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        # Large files are on another host, which the client must see as one to keep the headers of the first answer.
        self.lfs_address = f"http://localhost:{self.server.server_port}/lfs"

    def commit(self, name: str, tree: dict[str, bytes]) -> str:
        """Commits `tree` to the main branch; returns the commit."""
        large = (content for path, content in tree.items() if path.endswith(LFS_SUFFIXES))
        self.lfs.update({hashlib.sha256(content).hexdigest(): content for content in large})
        return self.repos[name].commit(tree)

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class HubHandler(BaseHTTPRequestHandler):
    """The part of the Hub's API that uploads, downloads and loading use."""

    protocol_version = "HTTP/1.1"
    server_hub: Hub

    ROUTES = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create_repo"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/(?:models|spaces)/(.+/.+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/api/(?:models|spaces)/(.+/.+)/commit/([^/]+)", "commit"),
        ("GET", r"/api/models/(.+/.+)/tree/([^/]+)(?:/(.*))?", "tree"),
        ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", "model_info"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(\w+)", "lfs_put"),
        ("GET", r"/lfs/(\w+)/(.+)", "lfs_get"),
        ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "file"),
    )

    def log_message(self, *_):
        pass

    def dispatch(self, method: str) -> None:
        path = unquote(self.path.split("?")[0])
        for route_method, pattern, name in self.ROUTES:
            if route_method == method and (match := re.fullmatch(pattern, path)):
                return getattr(self, name)(*match.groups())
        self.fail(404, "EntryNotFound", f"no route for {self.command} {path}")

    def do_GET(self):
        self.dispatch("GET")

    do_HEAD = do_GET

    def do_POST(self):
        self.dispatch("POST")

    def do_PUT(self):
        self.dispatch("PUT")

    # --- answers

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def send(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_json(self, value, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode(), Content_Type="application/json")

    def fail(self, status: int, code: str, message: str) -> None:
        self.send(status, message.encode(), X_Error_Code=code, X_Error_Message=message)

    def find(self, name: str, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        """The commit and its tree; answers with an error and returns None where there is none."""
        repo = self.server_hub.repos.get(name)
        if repo is None:
            return self.fail(404, "RepoNotFound", f"no repo {name}")
        commit = repo.resolve(revision or "main")
        if commit is None:
            return self.fail(404, "RevisionNotFound", f"no revision {revision}")
        return commit, repo.commits[commit]

    # --- accounts and repos

    def whoami(self):
        self.send_json({"type": "user", "name": "org", "orgs": []})

    def create_repo(self):
        wanted = json.loads(self.body())
        name = f"{wanted.get('organization') or 'org'}/{wanted['name']}"
        url = f"{self.server_hub.address}/{name}"
        if name in self.server_hub.repos:
            return self.send_json({"error": "You already created this model repo", "url": url}, status=409)
        repo = self.server_hub.repos[name] = Repo(private=wanted.get("visibility") == "private")
        repo.commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        self.send_json({"url": url, "name": name})

    def validate_yaml(self):
        self.body()
        self.send_json({"errors": [], "warnings": []})

    # --- uploads

    def preupload(self, name: str, revision: str):
        files = json.loads(self.body())["files"]
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
            }
            for file in files
        ]
        if self.find(name, revision):
            self.send_json({"files": modes})

    def lfs_batch(self, name: str):
        objects = json.loads(self.body())["objects"]
        for wanted in objects:
            if wanted["oid"] not in self.server_hub.lfs:  # an object that is there has no actions
                href = f"{self.server_hub.lfs_address}/{wanted['oid']}"
                wanted["actions"] = {"upload": {"href": href, "header": {}}}
        self.send_json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str):
        content = self.body()
        if hashlib.sha256(content).hexdigest() != oid:
            return self.fail(422, "BadContent", "the content is not what was announced")
        self.server_hub.lfs[oid] = content
        self.send(200)

    def commit(self, name: str, revision: str):
        operations = [json.loads(line) for line in self.body().splitlines()]
        found = self.find(name, revision)
        if found is None:
            return
        tree = dict(found[1])
        for operation in operations:
            value = operation["value"]
            match operation["key"]:
                case "file":
                    tree[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    tree[value["path"]] = self.server_hub.lfs[value["oid"]]
                case "deletedFile":
                    del tree[value["path"]]
        commit = self.server_hub.commit(name, tree)
        url = f"{self.server_hub.address}/{name}/commit/{commit}"
        self.send_json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    # --- downloads

    def model_info(self, name: str, revision: str | None):
        if found := self.find(name, revision):
            commit, tree = found
            names = dict.fromkeys(("_id", "id", "modelId"), name)
            siblings = [{"rfilename": path} for path in tree]
            private = self.server_hub.repos[name].private
            self.send_json({**names, "sha": commit, "siblings": siblings, "tags": [], "private": private})

    def tree(self, name: str, revision: str, folder: str | None):
        if not (found := self.find(name, revision)):
            return
        prefix = f"{folder}/" if folder else ""
        entries = []
        for path, content in found[1].items():
            if path.startswith(prefix):
                entry = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
                if path.endswith(LFS_SUFFIXES):
                    entry["lfs"] = {
                        "oid": hashlib.sha256(content).hexdigest(),
                        "size": len(content),
                        "pointerSize": 130,
                    }
                entries.append(entry)
        if folder and not entries:
            return self.fail(404, "EntryNotFound", f"no folder {folder}")
        self.send_json(entries)

    def file(self, name: str, revision: str, path: str):
        if not (found := self.find(name, revision)):
            return
        commit, tree = found
        if path not in tree:
            return self.send(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        content = tree[path]
        if path.endswith(LFS_SUFFIXES):
            oid = hashlib.sha256(content).hexdigest()
            return self.send(
                302,
                Location=f"{self.server_hub.lfs_address}/{oid}/{path}",
                X_Repo_Commit=commit,
                X_Linked_Etag=f'"{oid}"',
                X_Linked_Size=str(len(content)),
            )
        self.send_content(path, content, ETag=f'"{git_oid(content)}"', X_Repo_Commit=commit)

    def lfs_get(self, oid: str, path: str):
        self.send_content(path, self.server_hub.lfs[oid], ETag=f'"{oid}"')

    def send_content(self, path: str, content: bytes, **headers: str):
        """Sends all of it, or what `Range` asks for, unless `before_content` breaks the connection."""
        status, wanted = 200, self.headers.get("Range")
        if self.command == "HEAD":
            return self.send(200, content, **headers)
        self.server_hub.downloads.append((path, wanted))
        if wanted:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted).group(1))
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            status, content = 206, content[start:]
        breaks_after = self.server_hub.before_content(path)
        if breaks_after is None:
            return self.send(status, content, **headers)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content[:breaks_after])
        self.close_connection = True
