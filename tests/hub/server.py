"""A Hub on localhost for the tests: the routes that huggingface_hub documents, strict, with faults on demand.

Written from what the client sends and expects and from git-lfs's batch API. It refuses what the Hub refuses: an unknown
token (401), a foreign organisation (403), a stale parent commit (412), content that is not of the announced size and
hash. Storage has another origin (`localhost`) than the API (`127.0.0.1`), and refuses a token, as signed URLs do.
"""

import base64
import hashlib
import json
import re
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LFS_TYPE = 'application/vnd.git-lfs+json'


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()


@dataclass(frozen=True)
class File:
    """A committed file: its bytes, or those of the LFS object `sha256`."""

    data: bytes
    sha256: str | None = None

    @property
    def oid(self) -> str:
        if self.sha256 is None:
            return git_oid(self.data)
        pointer = f'version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n'
        return git_oid(pointer.encode())

    def as_json(self, path: str) -> dict:
        entry = dict(type='file', path=path, oid=self.oid, size=len(self.data))
        if self.sha256:
            entry['lfs'] = dict(oid=self.sha256, size=len(self.data), pointerSize=134)
        return entry


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # refs/heads/main, refs/tags/..., refs/pr/1
    titles: dict[int, str] = field(default_factory=dict)  # of pull requests
    lfs: dict[str, bytes] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, File]) -> str:
        oid = hashlib.sha1(
            f'{len(self.commits)} {ref} {sorted((p, f.oid) for p, f in files.items())}'.encode()
        ).hexdigest()
        self.commits[oid] = files
        self.refs[ref] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        for ref in (revision, f'refs/heads/{revision}', f'refs/tags/{revision}'):
            if ref in self.refs:
                return self.refs[ref]
        return revision if revision in self.commits else None

    @property
    def head(self) -> dict[str, File]:
        return self.commits[self.refs['refs/heads/main']]


@dataclass
class Fault:
    """What goes wrong with the next `times` requests of `method` whose path `pattern` is found in.

    kind: a status; 'cut' (the connection ends before the request is handled, or in the middle of a file),
    'lost' (it is handled, and the connection ends before the answer), 'flip' (one byte of a file is another), 'slow'.
    """

    method: str
    pattern: str
    kind: int | str
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    body: str = '{"error": "a fault"}'


class Refusal(Exception):
    def __init__(self, status: int, error: str, code: str = '') -> None:
        self.status, self.error, self.code = status, error, code


class HubServer:
    """Use as a context manager; `url` is the endpoint.

    Attributes:
        tokens: organisations that each token may write to.
        repos: by id.
        collections: items by slug.
        faults: see `Fault`.
        requests: method and path of all requests so far.
        mistakes: requests that the Hub does not know, or that sent a token where none belongs. Should stay empty.
    """

    def __init__(self) -> None:
        self.tokens: dict[str, set[str]] = {}
        self.repos: dict[str, Repo] = {}
        self.collections: dict[str, list[str]] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.mistakes: list[str] = []
        self.before: Callable[[str, str], None] = lambda method, path: None
        self.lock = threading.RLock()
        hub = self

        class Handler(_Handler):
            server_hub = hub

        class Server(ThreadingHTTPServer):
            def handle_error(self, request, client_address) -> None:
                if not isinstance(error := sys.exc_info()[1], ConnectionError):  # the client gave up on us
                    hub.mistakes.append(repr(error))

        self.http = Server(('127.0.0.1', 0), Handler)
        self.port = self.http.server_port
        self.url = f'http://127.0.0.1:{self.port}'
        self.storage = f'http://localhost:{self.port}'

    def __enter__(self) -> 'HubServer':
        threading.Thread(target=self.http.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.http.shutdown()
        self.http.server_close()

    def fault(self, method: str, pattern: str, kind: int | str, times: int = 1, **kwargs) -> None:
        self.faults.append(Fault(method, pattern, kind, times, **kwargs))

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault
        return None

    def add(self, repo_id: str, files: dict[str, bytes], **kwargs) -> Repo:
        """A repository that is there already."""
        repo = self.repos[repo_id] = Repo(**kwargs)
        content = {}
        for path, data in files.items():
            sha = hashlib.sha256(data).hexdigest() if path.endswith(('.safetensors', '.bin')) else None
            if sha:
                repo.lfs[sha] = data
            content[path] = File(data, sha)
        repo.commit('refs/heads/main', content)
        return repo


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    server_hub: HubServer

    def log_message(self, *_) -> None:
        pass

    def handle_any(self) -> None:
        hub, self.body = self.server_hub, self.read_body()
        split = urlsplit(self.path)
        self.query, path = parse_qs(split.query), unquote(split.path)
        with hub.lock:
            hub.requests.append((self.command, path))
        self.fault = hub.take_fault(self.command, path)
        kind = self.fault.kind if self.fault else None
        hub.before(self.command, path)
        if kind == 'slow':
            threading.Event().wait(1.5)  # time.sleep is the client's, which does not wait
        if kind == 'cut' and not path.startswith('/storage/'):
            return self.hang_up()
        if isinstance(kind, int):
            return self.answer(kind, self.fault.body.encode(), **self.fault.headers)
        try:
            with hub.lock:
                self.route(path)
        except Refusal as refusal:
            headers = {'X-Error-Code': refusal.code} if refusal.code else {}
            self.answer_json(dict(error=refusal.error), refusal.status, **headers, **{'X-Error-Message': refusal.error})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def read_body(self) -> bytes:
        if self.headers.get('Transfer-Encoding') == 'chunked':
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b''.join(chunks)
        return self.rfile.read(int(self.headers.get('Content-Length', 0)))

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def answer(self, status: int, body: bytes = b'', **headers: str) -> None:
        kind = self.fault.kind if self.fault else None
        if kind == 'lost':
            return self.hang_up()
        if kind == 'flip' and body:
            body = body[:-1] + bytes([body[-1] ^ 1])
        self.send_response(status)
        for name, value in {'Content-Length': str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != 'HEAD':
            if kind == 'cut':
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                return self.hang_up()
            self.wfile.write(body)

    def answer_json(self, data: object, status: int = 200, **headers: str) -> None:
        self.answer(status, json.dumps(data).encode(), **{'Content-Type': 'application/json', **headers})

    # who may what

    @property
    def token(self) -> str | None:
        header = self.headers.get('Authorization')
        if header is None:
            return None
        token = header.removeprefix('Bearer ')
        if token not in self.server_hub.tokens:
            raise Refusal(401, 'Invalid credentials in Authorization header')
        return token

    def may_write(self, org: str) -> bool:
        return self.token is not None and org in self.server_hub.tokens[self.token]

    def repo(self, repo_id: str, write: bool = False) -> Repo:
        org, repo = repo_id.partition('/')[0], self.server_hub.repos.get(repo_id)
        if repo is None or (repo.private and not self.may_write(org)):
            if self.token is None:
                raise Refusal(401, 'Invalid username or password.', 'RepoNotFound')
            raise Refusal(404, 'Repository not found', 'RepoNotFound')
        if write and not self.may_write(org):
            if self.token is None:
                raise Refusal(401, 'Invalid username or password.')
            raise Refusal(403, f'You do not have write access to {org}')
        return repo

    def revision(self, repo: Repo, revision: str) -> str:
        oid = repo.resolve(revision)
        if oid is None:
            raise Refusal(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        return oid

    # routes

    def route(self, path: str) -> None:
        if not path.startswith('/storage/'):
            _ = self.token  # one that is not valid is refused everywhere
        for method, pattern, function in self.ROUTES:
            if method == self.command.replace('HEAD', 'GET') and (match := re.fullmatch(pattern, path)):
                return function(self, **match.groupdict())
        self.server_hub.mistakes.append(f'{self.command} {path}')
        raise Refusal(404, 'Sorry, we can not find the page you are looking for.')

    def create(self) -> None:
        body = json.loads(self.body)
        org, name = body['organization'], body['name']
        repo_id = f'{org}/{name}'
        if self.token is None:
            raise Refusal(401, 'Invalid username or password.')
        if not self.may_write(org):
            raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{org}"')
        url = f'{self.server_hub.url}/{repo_id}'
        if repo_id in self.server_hub.repos:
            return self.answer_json(dict(error='You already created this model repo', url=url), 409)
        if not re.fullmatch(r'[\w.-]+', name) or body.get('type', 'model') != 'model':
            raise Refusal(400, 'Invalid repo')
        private = body.get('visibility', 'private' if body.get('private') else 'public') == 'private'
        repo = self.server_hub.repos[repo_id] = Repo(private=private)
        repo.commit('refs/heads/main', {'.gitattributes': File(b'*.safetensors filter=lfs diff=lfs merge=lfs -text\n')})
        self.answer_json(dict(url=url, id=repo_id, name=repo_id))

    def validate_yaml(self) -> None:
        content = json.loads(self.body)['content']
        if not content.startswith('---\n'):
            return self.answer_json(dict(errors=[dict(message='no metadata')], warnings=[]), 400)
        self.answer_json(dict(errors=[], warnings=[]))

    def info(self, repo_id: str, revision: str = 'main') -> None:
        repo = self.repo(repo_id)
        oid = self.revision(repo, revision)
        siblings = [dict(rfilename=path) for path in repo.commits[oid]]
        flags = dict(private=repo.private, gated='manual' if repo.gated else False, disabled=False)
        self.answer_json(dict(id=repo_id, modelId=repo_id, sha=oid, siblings=siblings, tags=[], **flags))

    def tree(self, repo_id: str, revision: str) -> None:
        repo = self.repo(repo_id)
        files = repo.commits[self.revision(repo, revision)]
        self.answer_json([file.as_json(path) for path, file in files.items()])

    def list_refs(self, repo_id: str) -> None:
        repo = self.repo(repo_id)
        of = lambda kind: [  # noqa: E731
            dict(name=ref.removeprefix(kind), ref=ref, targetCommit=oid)
            for ref, oid in repo.refs.items()
            if ref.startswith(kind)
        ]
        self.answer_json(dict(branches=of('refs/heads/'), tags=of('refs/tags/'), converts=[]))

    def tag(self, repo_id: str, revision: str) -> None:
        repo = self.repo(repo_id, write=True)
        name = f'refs/tags/{json.loads(self.body)["tag"]}'
        oid = self.revision(repo, revision)
        if name in repo.refs:
            raise Refusal(409, f'Reference already exists: {name}')
        repo.refs[name] = oid
        self.answer_json({})

    def preupload(self, repo_id: str, revision: str) -> None:
        repo = self.repo(repo_id, write='create_pr' not in self.query)
        files = repo.commits[self.revision(repo, revision)]
        modes = []
        for asked in json.loads(self.body)['files']:
            path, sample = asked['path'], base64.b64decode(asked['sample'])
            lfs = path.endswith('.safetensors') or asked['size'] > 10_000_000 or b'\0' in sample
            mode = dict(path=path, uploadMode='lfs' if lfs else 'regular', shouldIgnore=False)
            file = files.get(path)
            modes.append({**mode, 'oid': file and (file.sha256 or file.oid)})
        self.answer_json(dict(files=modes))

    def no_xet(self, repo_id: str, revision: str) -> None:
        raise Refusal(404, 'This Hub has no Xet storage')

    def lfs_batch(self, repo_id: str) -> None:
        repo = self.repo(repo_id, write=True)
        body = json.loads(self.body)
        if body['operation'] != 'upload' or body['hash_algo'] != 'sha256' or 'basic' not in body['transfers']:
            raise Refusal(422, 'Unsupported batch request')
        objects = []
        for asked in body['objects']:
            if not re.fullmatch('[0-9a-f]{64}', asked['oid']) or asked['size'] < 0:
                raise Refusal(422, 'Invalid object')
            entry = dict(oid=asked['oid'], size=asked['size'])
            if asked['oid'] not in repo.lfs:
                upload = f'{self.server_hub.storage}/storage/{repo_id}/{asked["oid"]}?size={asked["size"]}'
                verify = f'{self.server_hub.url}/{repo_id}.git/info/lfs/verify'
                entry['actions'] = dict(upload=dict(href=upload), verify=dict(href=verify))
            objects.append(entry)
        self.answer_json(dict(transfer='basic', objects=objects), **{'Content-Type': LFS_TYPE})

    def lfs_verify(self, repo_id: str) -> None:
        repo, body = self.repo(repo_id, write=True), json.loads(self.body)
        if len(repo.lfs.get(body['oid'], b'')) != body['size']:
            raise Refusal(404, 'Object was not uploaded whole')
        self.answer_json({})

    def no_token(self) -> None:
        if 'Authorization' in self.headers:
            self.server_hub.mistakes.append(f'a token sent to storage: {self.path}')
            raise Refusal(400, 'Only one auth mechanism allowed')

    def store(self, repo_id: str, oid: str) -> None:
        self.no_token()
        body = self.body
        if self.fault and self.fault.kind == 'flip':  # on its way here
            body, self.fault = body[:-1] + bytes([body[-1] ^ 1]), None
        if self.fault and self.fault.kind == 'cut':
            return self.hang_up()
        if len(body) != int(self.query['size'][0]) or hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, 'The content does not have the announced size and SHA-256')
        self.server_hub.repos[repo_id].lfs[oid] = body
        self.answer(200)

    def commit(self, repo_id: str, revision: str) -> None:
        create_pr = 'create_pr' in self.query
        repo = self.repo(repo_id, write=not create_pr)
        head = self.revision(repo, revision)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(line['value'] for line in lines if line['key'] == 'header')
        if not header['summary']:
            raise Refusal(400, 'A commit needs a summary')
        if header.get('parentCommit', head) != head:
            raise Refusal(412, 'A commit has happened since. Please refresh and try again.')
        files = dict(repo.commits[head])
        for line in lines:
            value, path = line['value'], line['value'].get('path', '')
            if line['key'] != 'header' and ('..' in path.split('/') or path.startswith('/') or not path):
                raise Refusal(400, f'Invalid path {path!r}')
            if line['key'] == 'file':
                files[path] = File(base64.b64decode(value['content'], validate=True))
            elif line['key'] == 'lfsFile':
                data = repo.lfs.get(value['oid'])
                if data is None or len(data) != value['size']:
                    raise Refusal(400, f'LFS object {value["oid"]} was not uploaded')
                files[path] = File(data, value['oid'])
            elif line['key'] == 'deletedFile':
                if path not in files:
                    raise Refusal(404, "A file with this name doesn't exist", 'EntryNotFound')
                del files[path]
            elif line['key'] != 'header':
                raise Refusal(400, f'Unknown operation {line["key"]}')
        number = len(repo.titles) + 1
        oid = repo.commit(f'refs/pr/{number}' if create_pr else 'refs/heads/main', files)
        answer = dict(success=True, commitOid=oid, commitUrl=f'{self.server_hub.url}/{repo_id}/commit/{oid}')
        if create_pr:
            repo.titles[number] = header['summary']
            answer['pullRequestUrl'] = f'{self.server_hub.url}/{repo_id}/discussions/{number}'
        self.answer_json(answer)

    def discussions(self, repo_id: str) -> None:
        found = [
            dict(
                num=number,
                title=title,
                status='open',
                isPullRequest=True,
                author=dict(name='somebody'),
                createdAt='2026-01-01T00:00:00.000Z',
                repo=dict(name=repo_id, type='model'),
            )
            for number, title in self.repo(repo_id).titles.items()
        ]
        self.answer_json(dict(discussions=found, count=len(found), start=0))

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        repo = self.repo(repo_id)
        if repo.gated and not self.may_write(repo_id.partition('/')[0]):
            status = 401 if self.token is None else 403
            raise Refusal(status, f'Access to model {repo_id} is restricted and you are not authorized', 'GatedRepo')
        oid = self.revision(repo, revision)
        file = repo.commits[oid].get(path)
        if file is None:
            self.fault = None
            headers = {'X-Error-Code': 'EntryNotFound', 'X-Error-Message': 'Entry not found', 'X-Repo-Commit': oid}
            return self.answer_json(dict(error='Entry not found'), 404, **headers)
        if file.sha256 is None:
            return self.answer(200, file.data, **{'ETag': f'"{file.oid}"', 'X-Repo-Commit': oid})
        headers = {'X-Linked-Etag': f'"{file.sha256}"', 'X-Linked-Size': str(len(file.data)), 'X-Repo-Commit': oid}
        location = f'{self.server_hub.storage}/storage/{repo_id}/{file.sha256}?signature=0'
        self.answer(302, b'Found', Location=location, ETag=f'"{file.oid}"', **headers)

    def load(self, repo_id: str, oid: str) -> None:
        self.no_token()
        data = self.server_hub.repos[repo_id].lfs[oid]
        if asked := re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', '')):
            start = int(asked[1])
            part = data[start : int(asked[2]) + 1 if asked[2] else None]
            span = f'bytes {start}-{start + len(part) - 1}/{len(data)}'
            return self.answer(206, part, **{'ETag': f'"{oid}"', 'Content-Range': span})
        self.answer(200, data, ETag=f'"{oid}"')

    def collection(self, slug: str, new: str | None = None) -> None:
        items = self.server_hub.collections.get(slug)
        if items is None:
            raise Refusal(404, 'Collection not found')
        if self.command == 'POST':
            item = json.loads(self.body)['item']
            if not self.may_write(slug.partition('/')[0]):
                raise Refusal(403, 'You may not write to this collection')
            self.repo(item['id'])
            if item['id'] in items:
                raise Refusal(409, 'Item already in collection')
            items.append(item['id'])
        listed = [dict(_id=str(i), id=item, type='model', position=i) for i, item in enumerate(items)]
        facts = dict(slug=slug, title=slug, owner={}, lastUpdated='2026-01-01T00:00:00.000Z', position=0, theme='blue')
        self.answer_json(dict(**facts, items=listed, private=False, upvotes=0))

    _ID = r'(?P<repo_id>[\w.-]+/[\w.-]+)'
    _API = rf'/api/models/{_ID}'
    ROUTES = (
        ('GET', '/api/agent-harnesses', lambda self: self.answer_json({})),  # for the client's user agent
        ('GET', rf'{_API}/xet-write-token/(?P<revision>.+)', no_xet),
        ('POST', '/api/repos/create', create),
        ('POST', '/api/validate-yaml', validate_yaml),
        ('GET', _API, info),
        ('GET', rf'{_API}/revision/(?P<revision>.+)', info),
        ('GET', rf'{_API}/tree/(?P<revision>.+)', tree),
        ('GET', rf'{_API}/refs', list_refs),
        ('GET', rf'{_API}/discussions', discussions),
        ('POST', rf'{_API}/tag/(?P<revision>.+)', tag),
        ('POST', rf'{_API}/preupload/(?P<revision>.+)', preupload),
        ('POST', rf'{_API}/commit/(?P<revision>.+)', commit),
        ('POST', rf'/{_ID}\.git/info/lfs/objects/batch', lfs_batch),
        ('POST', rf'/{_ID}\.git/info/lfs/verify', lfs_verify),
        ('PUT', rf'/storage/{_ID}/(?P<oid>\w+)', store),
        ('GET', rf'/storage/{_ID}/(?P<oid>\w+)', load),
        ('GET', rf'/{_ID}/resolve/(?P<revision>refs/pr/\d+|[^/]+)/(?P<path>.+)', resolve),
        ('GET', r'/api/collections/(?P<slug>.+)', collection),
        ('POST', r'/api/collections/(?P<slug>.+)/items', collection),
    )
