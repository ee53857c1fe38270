"""A Hugging Face Hub on loopback: the part of its HTTP protocol that pushing and loading a model needs

Files named *.safetensors and *.bin are stored as the Hub stores large files: uploaded through the LFS batch API, served
from another address after a redirect that carries their hash and size. Clients need HF_HUB_DISABLE_XET=1.

`faults` says what goes wrong with the next request of a kind: {'blob': 'cut'} breaks the next download of a large file
off in its middle, 'short' leaves its end out, 'lie' changes a byte of it; any kind takes 'hang', no answer, or '500'.
"""
import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Dict, List, Set

TOKEN = 'hf_of_the_loopback_server'


def _is_large(path: str) -> bool:
    return path.endswith(('.safetensors', '.bin'))


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), _Handler)
        self.endpoint = f'http://127.0.0.1:{self.server_port}'
        self.blobs: Dict[str, bytes] = {}
        self.repos: Dict[str, Dict[str, Dict[str, str]]] = {}  # repository -> revision -> path -> blob's sha256
        self.private: Set[str] = set()  # repositories that are hidden from clients without the token
        self.ranges: List[str] = []  # Range headers of the downloads of large files, '' for all of it
        self.faults: Dict[str, str] = {}
        self.stopped = threading.Event()
        self.env = dict(
            HF_ENDPOINT=self.endpoint, HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_TELEMETRY='1')

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args):
        self.stopped.set()
        self.shutdown()
        self.server_close()

    def store(self, content: bytes) -> str:
        oid = hashlib.sha256(content).hexdigest()
        self.blobs[oid] = content
        return oid

    def commit(self, repo: str, files: Dict[str, str]) -> str:
        revisions = self.repos.setdefault(repo, {})
        revisions['main'] = files
        sha = self.sha(repo, 'main')
        revisions[sha] = files
        return sha

    def sha(self, repo: str, revision: str) -> str:
        return hashlib.sha1(json.dumps(self.repos[repo][revision], sort_keys=True).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args):
        pass

    def _send(self, status: int, content=b'', **headers: str):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header('Content-Length', str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace('_', '-'), value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def _error(self, status: int, code: str):
        self._send(status, {'error': code}, X_Error_Code=code, X_Error_Message=code)

    def _dispatch(self, routes):
        path = self.path.split('?')[0]
        authorization = self.headers.get('Authorization')
        if authorization != f'Bearer {TOKEN}' and (authorization or self.command == 'POST'):
            return self._send(401, X_Error_Message='Invalid credentials in Authorization header')
        self.body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        for pattern, handle in routes:
            match = re.fullmatch(pattern, path)
            if match:
                self.fault = self.server.faults.pop(handle.__name__.strip('_'), '')
                if self.fault == 'hang':
                    self.close_connection = self.server.stopped.wait()
                elif self.fault.isdigit():
                    self._send(int(self.fault))
                else:
                    handle(self, *match.groups())
                return
        self._error(404, 'NotFound')

    def do_GET(self):
        self._dispatch([
            (r'/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?', _Handler._info),
            (r'/api/models/([^/]+/[^/]+)/tree/([^/]+)', _Handler._tree),
            (r'/([^/]+/[^/]+)/resolve/([^/]+)/(.+)', _Handler._resolve),
            (r'/blobs/(\w+)', _Handler._blob),
        ])

    do_HEAD = do_GET

    def do_POST(self):
        self._dispatch([
            (r'/api/repos/create', _Handler._create_repo),
            (r'/api/validate-yaml', lambda self: self._send(200, {'errors': [], 'warnings': []})),
            (r'/api/models/([^/]+/[^/]+)/preupload/([^/]+)', _Handler._preupload),
            (r'/([^/]+/[^/]+)\.git/info/lfs/objects/batch', _Handler._lfs_batch),
            (r'/api/models/([^/]+/[^/]+)/commit/([^/]+)', _Handler._commit),
        ])

    def do_PUT(self):
        self._dispatch([(r'/upload/(\w+)', _Handler._upload)])

    def _create_repo(self):
        request = json.loads(self.body)
        repo = f"{request.get('organization') or 'me'}/{request['name']}"
        self.server.repos.setdefault(repo, {'main': {}})
        self._send(200, {'url': f'{self.server.endpoint}/{repo}', 'id': repo, 'name': repo})

    def _find(self, repo, revision):
        """Files of a revision, or an answer that there is none and None."""
        hidden = repo in self.server.private and 'Authorization' not in self.headers
        if repo not in self.server.repos or hidden:
            return self._error(401 if hidden else 404, 'RepoNotFound')
        if revision not in self.server.repos[repo]:
            return self._error(404, 'RevisionNotFound')
        return self.server.repos[repo][revision]

    def _info(self, repo, revision):
        files = self._find(repo, revision or 'main')
        if files is not None:
            self._send(200, {
                'id': repo, 'sha': self.server.sha(repo, revision or 'main'), 'private': repo in self.server.private,
                'tags': [], 'siblings': [{'rfilename': path} for path in files]})

    def _tree(self, repo, revision):
        files = self._find(repo, revision)
        if files is not None:
            entries = []
            for path, oid in files.items():
                content = self.server.blobs[oid]
                size = len(content)
                lfs = {'oid': oid, 'size': size, 'pointerSize': 134} if _is_large(path) else None
                git = hashlib.sha1(b'blob %d\0' % size + content).hexdigest()
                entries.append({'type': 'file', 'path': path, 'oid': git, 'size': size, 'lfs': lfs})
            self._send(200, entries)

    def _preupload(self, repo, revision):
        files = [f['path'] for f in json.loads(self.body)['files']]
        self._send(200, {'files': [
            {'path': f, 'uploadMode': 'lfs' if _is_large(f) else 'regular', 'shouldIgnore': False} for f in files]})

    def _lfs_batch(self, repo):
        objects = json.loads(self.body)['objects']
        self._send(200, {'transfer': 'basic', 'objects': [
            {**o, 'actions': {'upload': {'href': f"{self.server.endpoint}/upload/{o['oid']}"}}} for o in objects]})

    def _upload(self, oid):
        self._send(200 if self.server.store(self.body) == oid else 400)

    def _commit(self, repo, revision):
        files = dict(self.server.repos[repo]['main'])
        for line in map(json.loads, self.body.splitlines()):
            if line['key'] == 'file':
                files[line['value']['path']] = self.server.store(base64.b64decode(line['value']['content']))
            elif line['key'] == 'lfsFile':
                files[line['value']['path']] = line['value']['oid']
        sha = self.server.commit(repo, files)
        self._send(200, {'commitUrl': f'{self.server.endpoint}/{repo}/commit/{sha}', 'commitOid': sha, 'success': True})

    def _resolve(self, repo, revision, path):
        files = self._find(repo, revision)
        if files is None:
            return
        oid = files.get(path)
        headers = dict(X_Repo_Commit=self.server.sha(repo, revision))
        if oid is None:
            return self._send(404, X_Error_Code='EntryNotFound', **headers)
        content = self.server.blobs[oid]
        if _is_large(path):
            self._send(
                302, ETag=f'"{oid[:32]}"', X_Linked_Etag=f'"{oid}"', X_Linked_Size=str(len(content)),
                Location=f'http://localhost:{self.server.server_port}/blobs/{oid}', **headers)
        else:
            self._send(200, content, ETag=f'"{oid[:40]}"', **headers)

    def _blob(self, oid):
        content, requested = self.server.blobs[oid], self.headers.get('Range', '')
        self.server.ranges.append(requested)
        start = int(re.fullmatch(r'bytes=(\d+)-', requested)[1]) if requested else 0
        if self.fault == 'cut':
            self.send_response(200)
            self.send_header('Content-Length', str(len(content)))
            self.end_headers()
            self.wfile.write(content[:len(content) // 2])
            self.close_connection = True
        else:
            middle = len(content) // 2
            if self.fault == 'short':
                content = content[:middle]
            elif self.fault == 'lie':
                content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]
            self._send(
                206 if requested else 200, content[start:], ETag=f'"{oid}"',
                Content_Range=f'bytes {start}-{len(content) - 1}/{len(content)}')
