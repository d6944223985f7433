"""A Hugging Face hub in this process: the few endpoints that huggingface_hub's own client needs.

It keeps what was committed in memory. Large files come by git-lfs, as the hub takes them without Xet.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_StubTokenThatNobodyMaySee"


class Hub(ThreadingHTTPServer):
    """The server.

    Attributes:
        commits: by repository, the files of each commit by its hash, oldest first.
        refs: by repository and branch, the hash of its newest commit.
        messages: of the commits, in order.
        requests: (method, path) of everything that was asked.
        refused: names of repositories that may not be written to.
        hidden: repositories that are private.
        told: what the creator of a repository asked for.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.commits, self.refs, self.blobs = {}, {}, {}
        self.messages, self.requests, self.refused, self.hidden, self.told = [], [], set(), set(), []
        self.yaml_errors = []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def files(self, repo, revision="main"):
        """The files of a revision, by name."""
        return self.commits[repo][self.refs[repo].get(revision, revision)]

    def commit(self, repo, files, branch="main", message="by hand"):
        """Put files into a repository as a commit; returns its hash."""
        history = self.commits.setdefault(repo, {})
        seed = [repo, len(history), sorted((name, _git_hash(data)) for name, data in files.items())]
        digest = hashlib.sha1(json.dumps(seed).encode()).hexdigest()
        history[digest] = dict(files)
        self.refs.setdefault(repo, {})[branch] = digest
        self.messages.append(message)
        return digest

    def upload(self, repo, folder, branch="main"):
        """Commit the files of a folder; returns the commit's hash."""
        return self.commit(repo, {path.name: path.read_bytes() for path in folder.iterdir()}, branch)


def _git_hash(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _mode(name, files):
    """How a file is to be sent, and the hash of the one that is there."""
    large = name.endswith((".safetensors", ".png"))
    oid = None
    if name in files:
        oid = hashlib.sha256(files[name]).hexdigest() if large else _git_hash(files[name])
    return {"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, value, status=200, error=None, message=None, **headers):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"X-Error-Code": error, "X-Error-Message": message}.items():
            if text:
                self.send_header(name, text)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def may_write(self, repo):
        """Whether the token may write there; otherwise the answer is sent."""
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid username or password."}, 401)
        elif repo in self.server.refused:
            said = f"{TOKEN} may not write to {repo}"  # no hub says the token; if one did, nobody may see it
            self.answer({"error": said}, 403, message=said)
        else:
            return True
        return False

    def find(self, repo, revision):
        """The commit of a revision; None: the answer is sent."""
        known = repo in self.server.commits
        if repo in self.server.hidden and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            known = False
        if not known:
            self.answer({"error": "Repository not found"}, 404, "RepoNotFound", "Repository not found")
            return None
        revision = self.server.refs[repo].get(revision, revision)
        if revision not in self.server.commits[repo]:
            self.answer({"error": "Invalid rev id"}, 404, "RevisionNotFound", "Invalid rev id")
            return None
        return revision

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.requests.append((self.command, self.path))
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[:2] == ["api", "models"]:
            repo, what = "/".join(parts[2:4]), parts[4] if len(parts) > 4 else ""
            revision = parts[5] if len(parts) > 5 else "main"
            if (commit := self.find(repo, revision)) is None:
                return
            files = self.server.commits[repo][commit]
            if what == "tree" and len(parts) > 6:
                return self.answer({"error": "no such folder"}, 404, "EntryNotFound")
            if what == "tree":
                entries = [
                    {"type": "file", "path": name, "size": len(data), "oid": _git_hash(data)}
                    for name, data in files.items()
                ]
                return self.answer(entries)
            if what in ("", "revision"):
                siblings = [{"rfilename": name} for name in files]
                private = repo in self.server.hidden
                return self.answer({"id": repo, "sha": commit, "private": private, "siblings": siblings})
        if len(parts) >= 5 and parts[2] == "resolve":
            repo, revision, name = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
            if (commit := self.find(repo, revision)) is None:
                return
            data = self.server.commits[repo][commit].get(name)
            if data is None:
                return self.answer({"error": "Entry not found"}, 404, "EntryNotFound", X_Repo_Commit=commit)
            return self.answer(data, X_Repo_Commit=commit, ETag=f'"{_git_hash(data)}"')
        self.answer({"error": f"no such endpoint: {self.path}"}, 404)

    def do_PUT(self):
        self.server.requests.append((self.command, self.path))
        data = self.body()
        assert self.path == f"/lfs/{hashlib.sha256(data).hexdigest()}"
        self.server.blobs[self.path.rpartition("/")[2]] = data
        self.answer({})

    def do_POST(self):
        self.server.requests.append((self.command, self.path))
        path, data = unquote(urlsplit(self.path).path), self.body()
        if path == "/api/validate-yaml":
            errors = [{"message": message} for message in self.server.yaml_errors]
            return self.answer({"warnings": [], "errors": errors}, 400 if errors else 200)
        if path == "/api/repos/create":
            asked = json.loads(data)
            repo = f"{asked['organization']}/{asked['name']}"
            if not self.may_write(repo):
                return None
            if repo in self.server.commits:
                return self.answer(
                    {"error": "You already created it", "url": f"{self.server.url}/{repo}"}, 409
                )
            self.server.told.append(asked)
            if asked.get("visibility") == "private":
                self.server.hidden.add(repo)
            self.server.commit(repo, {".gitattributes": b""}, message="initial")
            return self.answer({"url": f"{self.server.url}/{repo}", "id": repo})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.server.url}/lfs/{each['oid']}"}}}
                for each in json.loads(data)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        parts = path.strip("/").split("/")
        repo, what, revision = "/".join(parts[2:4]), parts[4], "/".join(parts[5:])
        if not self.may_write(repo):
            return None
        if what == "branch":
            if revision in self.server.refs[repo]:
                return self.answer({"error": "Reference already exists"}, 409)
            self.server.refs[repo][revision] = self.server.refs[repo]["main"]
            return self.answer({})
        if (commit := self.find(repo, revision)) is None:
            return None
        if what == "preupload":
            files = self.server.commits[repo][commit]
            modes = [_mode(each["path"], files) for each in json.loads(data)["files"]]
            return self.answer({"files": modes})
        assert what == "commit"
        return self.take_commit(repo, revision, commit, [json.loads(line) for line in data.splitlines()])

    def take_commit(self, repo, branch, commit, lines):
        files, summary = dict(self.server.commits[repo][commit]), lines[0]["value"]["summary"]
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            else:
                assert line["key"] == "deletedFile"
                del files[value["path"]]
        oid = self.server.commit(repo, files, branch, summary)
        self.answer({"commitUrl": f"{self.server.url}/{repo}/commit/{oid}", "commitOid": oid})
