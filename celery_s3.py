"""Celery results in Amazon S3: one file on botocore, without boto3 and without a server.

    result_backend = 'celery_s3.S3Backend'
    CELERY_S3_BACKEND_SETTINGS = {'bucket': 'my-results'}

`Bucket` speaks signed S3 over HTTP; `S3Backend` maps Celery's contract onto a `Bucket`.
"""

import os
import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from itertools import count, islice
from socket import IPPROTO_TCP, TCP_NODELAY

from botocore import auth, awsrequest, exceptions, httpsession, parsers, session, utils
from celery import states
from celery.app.task import Context
from celery.backends.base import KeyValueStoreBackend
from celery.exceptions import BackendStoreError, ImproperlyConfigured
from celery.utils.time import get_exponential_backoff_interval
from kombu.utils.encoding import bytes_to_str, ensure_bytes
from kombu.utils.functional import LRUCache

__all__ = ('Bucket', 'S3Backend')
__version__ = '2.0.0'

CONFLICTS = 20  # times that others write a task's state first, before storing it is given up
# HTTP statuses, and codes of https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
TRANSIENT = {429, 500, 502, 503, 504, 'ConditionalRequestConflict', 'RequestTimeout', 'Throttling'}
LOST = (exceptions.ConnectionError, exceptions.ConnectionClosedError, exceptions.ReadTimeoutError)
UNSAFE = re.compile(r'[\0-\x1f\x7f]|(^|/)\.\.?(/|$)')  # stores and proxies differ about such keys


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed when it is sent again."""
    if isinstance(error, exceptions.ClientError):
        status = error.response['ResponseMetadata']['HTTPStatusCode']
        return status in TRANSIENT or error.response.get('Error', {}).get('Code') in TRANSIENT
    return isinstance(error, LOST) and 'CERTIFICATE_VERIFY_FAILED' not in str(error)


@dataclass(repr=False, eq=False)
class Bucket:
    """A folder of an S3 bucket, for the threads of one process; its parameters are the settings.

    Raises TypeError or ValueError for a wrong setting or an unsafe key, ClientError for what S3
    refuses, and botocore's connection errors.
    """

    bucket: str
    base_path: str = ''
    aws_region: str = ''
    aws_profile: str = ''
    aws_access_key_id: str = ''
    aws_secret_access_key: str = ''
    aws_session_token: str = ''
    endpoint_url: str = ''
    headers: dict = field(default_factory=dict)
    conditional_writes: bool = True
    denied_is_missing: bool = False
    max_connections: int = 50

    def __post_init__(self):
        for setting in fields(self):
            if not isinstance(getattr(self, setting.name), setting.type):
                raise TypeError(f'{setting.name} must be of type {setting.type.__name__}')
        keys = (self.aws_access_key_id, self.aws_secret_access_key)
        if any((*keys, self.aws_session_token)) and not all(keys):
            raise ValueError('aws_access_key_id and aws_secret_access_key go together')
        if self.max_connections < 1:
            raise ValueError('max_connections must be 1 or more')
        folder = self.base_path.strip('/')
        self._prefix = f'{folder}/' if folder else ''
        self.uri = f's3://{self.bucket}/{self._prefix}'
        self.etags = LRUCache(limit=10_000)  # by key, for callers of put_if()
        self._quotes_etags = True  # in If-Match, as long as the store agrees
        self._lock = threading.Lock()  # two threads must not look up a session's credentials
        self._session = session.Session(profile=self.aws_profile or None)
        if self.aws_access_key_id:
            self._session.set_credentials(*keys, self.aws_session_token)
        config = self._session.get_config_variable
        self._attempts = config('max_attempts') or 5  # AWS_MAX_ATTEMPTS
        self._region = self.aws_region or config('region') or 'us-east-1'
        self._session.set_config_variable('region', self._region)  # STS is asked there, too
        self._root = self._find_root(config)
        self._http = httpsession.URLLib3Session(
            verify=config('ca_bundle') or os.environ.get('REQUESTS_CA_BUNDLE') or True,
            proxies=utils.get_environ_proxies(self._root),
            max_pool_connections=self.max_connections,
            socket_options=[(IPPROTO_TCP, TCP_NODELAY, 1)],  # Nagle's delay is 40 ms a PUT
        )

    def get(self, key: str) -> tuple[bytes | None, str | None]:
        """The object's bytes and its etag, or None and None where there is no such key."""
        missing = {'NoSuchKey', 'AccessDenied'} if self.denied_is_missing else {'NoSuchKey'}
        return self._send('GET', key, missing)[:2]

    def put(self, key: str, value: bytes) -> None:
        """Write the object, whatever was there."""
        self._send('PUT', key, (), value, self.headers)

    def put_if(self, key: str, value: bytes, etag: str | None) -> tuple[bytes | None, str | None]:
        """Write the object if it has this etag or, where the etag is None, if there is no object.

        Returns what is there then, as get() does: this value, or what others have written.
        https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html
        """
        if etag is None:
            headers = self.headers | {'If-None-Match': '*'}
            _, written, _ = self._send('PUT', key, {412}, value, headers)
            return self.get(key) if written is None else (value, written)
        accept = {412, 'NoSuchKey', 'InvalidArgument'}
        # AWS takes an etag with quotes or without, Cloudflare R2 only with, Ceph only without.
        for quoted in (self._quotes_etags, not self._quotes_etags):
            headers = self.headers | {'If-Match': f'"{etag}"' if quoted else etag}
            _, written, refusal = self._send('PUT', key, accept, value, headers)
            if written is not None:
                self._quotes_etags = quoted
                return value, written
            if refusal == 'InvalidArgument':
                accept.remove(refusal)  # if the other form is invalid, too, it is an error
        return self.get(key)  # perhaps this value, if an earlier attempt's answer got lost

    def delete(self, key: str) -> None:
        """Delete the object, if there is one."""
        self._send('DELETE', key, {'NoSuchKey'})

    def _find_root(self, config) -> str:
        """The URL that all keys come after."""
        endpoint = self.endpoint_url
        if not endpoint and not config('ignore_configured_endpoint_urls'):
            endpoint = os.environ.get('AWS_ENDPOINT_URL_S3') or os.environ.get('AWS_ENDPOINT_URL')
        if endpoint:
            if not endpoint.startswith(('http://', 'https://')):
                raise ValueError('endpoint_url must begin with http:// or https://')
            return f'{endpoint.rstrip("/")}/{self.bucket}/'
        # Only the suffix depends on the partition; botocore's list begins with the public one.
        known = self._session.get_component('data_loader').load_data('partitions')['partitions']
        partition = next((p for p in known if re.match(p['regionRegex'], self._region)), known[0])
        fips = '-fips' if config('use_fips_endpoint') else ''
        dual_stack = '.dualstack' if config('use_dualstack_endpoint') else ''
        host = f's3{fips}{dual_stack}.{self._region}.{partition["outputs"]["dnsSuffix"]}'
        if utils.check_dns_name(self.bucket):
            return f'https://{self.bucket}.{host}/'
        return f'https://{host}/{self.bucket}/'

    def _send(self, method, key, accept, body=b'', headers=None):
        """The object's bytes and etag, and the code of a refusal that is accepted."""
        path = self._prefix + key
        if UNSAFE.search(path):
            raise ValueError(f'{path!r} has dots or control characters that are not safe in a key')
        url = self._root + utils.percent_encode(path, safe='/-._~')
        for attempt in count(1):
            try:
                request = awsrequest.AWSRequest(method, url, headers, body)
                return self._send_once(request, f'{method} {self.uri}{key}', accept)
            except (exceptions.ClientError, *LOST) as error:
                if attempt >= self._attempts or not is_transient(error):
                    raise
            time.sleep(get_exponential_backoff_interval(100, attempt, 20_000, True) / 1000)

    def _send_once(self, request, operation, accept):
        """One attempt of _send()."""
        with self._lock:
            credentials = self._session.get_credentials()
        frozen = credentials and credentials.get_frozen_credentials()
        auth.S3SigV4Auth(frozen, 's3', self._region).add_auth(request)
        answer = self._http.send(request.prepare())
        status, headers, body = answer.status_code, answer.headers, answer.content
        if len(body) != int(headers.get('content-length', len(body))):
            raise exceptions.ConnectionClosedError(endpoint_url=f'{request.url} (cut short)')
        if request.method == 'PUT' and status == 200 and b'<Error' in body:
            status = 500  # AWS may fail after it has said 200
        if status < 300:
            return body, headers.get('etag', '').strip('"'), None
        parse = parsers.create_parser('rest-xml').parse
        refusal = parse({'status_code': status, 'headers': headers, 'body': body}, None)
        code = refusal.get('Error', {}).get('Code')
        if status in accept or code in accept:
            return None, None, code
        region = headers.get('x-amz-bucket-region', self._region)  # if not ours, set aws_region
        details = f'HTTP {status}, bucket in {region}, request {headers.get("x-amz-request-id")}'
        raise exceptions.ClientError(refusal, f'{operation} ({details})')


class S3Backend(KeyValueStoreBackend):
    """Celery's results, groups and chords in a `Bucket`."""

    supports_result_compression = True
    key_t = bytes_to_str
    exception_safe_to_retry = staticmethod(is_transient)

    def __init__(self, app, *args, **kwargs):
        conf = app.conf
        given = conf.get('CELERY_S3_BACKEND_SETTINGS') or conf.get('s3_backend_settings') or {}
        try:
            unset = [name for name in Bucket.__annotations__ if given.get(name) in (None, '')]
            self._settings = {name: given[name] for name in given if name not in unset}
            self._buckets = {os.getpid(): Bucket(**self._settings)}
        except (AttributeError, TypeError, ValueError, exceptions.BotoCoreError) as error:
            known = f'a dict of {", ".join(Bucket.__annotations__)}'
            raise ImproperlyConfigured(f'CELERY_S3_BACKEND_SETTINGS, {known}: {error}') from error
        super().__init__(app, *args, **kwargs)
        self.thread_safe = True  # otherwise Celery makes a backend for each thread

    @property
    def bucket(self) -> Bucket:
        """This process's own: neither connections nor locks may cross a fork."""
        if os.getpid() not in self._buckets:
            self._buckets[os.getpid()] = Bucket(**self._settings)
        return self._buckets[os.getpid()]

    def as_uri(self, include_password: bool = False) -> str:
        return self.bucket.uri

    def get(self, key: bytes | str) -> bytes | None:
        return self.bucket.get(bytes_to_str(key))[0]

    def mget(self, keys: list) -> list:
        with ThreadPoolExecutor(self.bucket.max_connections) as threads:
            return list(threads.map(self.get, keys))

    def set(self, key: bytes | str, value: bytes | str) -> None:
        self.bucket.put(bytes_to_str(key), ensure_bytes(value))

    def delete(self, key: bytes | str) -> None:
        self.bucket.delete(bytes_to_str(key))

    def _look(self, task_ids: list, ready_states=states.READY_STATES, whole=False, size=1):
        """Yield {task id: meta} and the pending ids of `size` tasks, then of twice as many...
        It ends where one is pending, unless the whole list is wanted."""
        while task_ids:
            size = max(1, min(int(size), self.bucket.max_connections))
            batch, task_ids = task_ids[:size], task_ids[size:]
            with ThreadPoolExecutor(size) as threads:
                run = map if size == 1 else threads.map  # a thread costs as much as a request
                metas = dict(zip(batch, run(self.get_task_meta, batch)))
            pending = [task for task in batch if metas[task]['status'] not in ready_states]
            yield metas, pending
            if pending and not whole:
                return
            size = 2 * size

    # Storing: a state in one PUT that cannot replace a SUCCESS.

    def _store_result(self, task_id, result, state, traceback=None, request=None, **kwargs):
        bucket = self.bucket
        if not bucket.conditional_writes:
            return super()._store_result(task_id, result, state, traceback, request, **kwargs)
        meta = self._get_result_meta(result, state, traceback, request)
        value = ensure_bytes(self.encode(meta | {'task_id': bytes_to_str(task_id)}))
        key = self.get_key_for_task(task_id)
        etag = bucket.etags.data.get(key)  # its own get() fails when another thread evicts the key
        for _ in range(CONFLICTS):
            found, etag = bucket.put_if(key, value, etag)
            if found == value and state != states.SUCCESS:
                bucket.etags[key] = etag
            if found == value or (found and self.decode(found)['status'] == states.SUCCESS):
                return result
        raise BackendStoreError('others write it or hide it', state=state, task_id=task_id)

    # Waiting: the longer it takes, the less often it asks.

    supports_native_join = True

    def wait_for(self, task_id, timeout=None, interval=0.5, no_ack=True, on_interval=None):
        for _, meta in self.get_many([task_id], timeout, interval, no_ack, None, on_interval):
            return meta

    def get_many(self, task_ids, timeout=None, interval=0.5, no_ack=True, on_message=None,
            on_interval=None, max_iterations=None, READY_STATES=states.READY_STATES):  # fmt: skip
        """Yield (task id, meta) of each task once it is ready, in whatever order they end."""
        waiting = list({bytes_to_str(task_id) for task_id in task_ids})
        began = last_ready = time.monotonic()
        pause = 0.5 if interval is None else interval
        for _ in islice(count(), max_iterations or None):  # None: without end
            left = float('inf') if timeout is None else began + timeout - time.monotonic()
            whole = max_iterations or left <= 0  # the last look is at all
            # Two tasks for each second of the pause: Celery looks as often at a single one.
            for metas, pending in self._look(waiting, READY_STATES, whole, size=2 * pause):
                # What is pending goes to the end of the line, where it hides nobody who is ready.
                waiting = waiting[len(metas) :] + pending
                for task_id in set(metas).difference(pending):
                    self._cache[task_id] = metas[task_id]
                    if on_message is not None:
                        on_message(metas[task_id])
                    yield task_id, metas[task_id]
                    last_ready = time.monotonic()
            if not waiting:
                return
            if left <= 0:
                raise self.TimeoutError(f'The operation timed out ({timeout})')
            if interval in (None, 0.5):  # Celery's default: the caller has no interval of its own
                pause = min(max(0.5, (time.monotonic() - last_ready) / 10), 30)
            time.sleep(min(pause, left))
            if on_interval:
                on_interval()  # before the next look: a parent's own error comes first

    # Chords: without polling, markers or listings; the chord's key names the part that it awaits.

    implements_incr = property(lambda self: self.bucket.conditional_writes)  # else Celery polls

    def incr(self, key: str) -> int:
        return 1  # Celery compares it with chord_size, which on_chord_part_return() sets

    def _apply_chord_incr(self, header_result_args, body, **kwargs):
        super()._apply_chord_incr(header_result_args, body, **kwargs)
        group_id, results = header_result_args
        *_, last = find_tasks(results)
        self.bucket.put_if(self.get_key_for_chord(group_id), last.encode(), None)

    def store_result(self, task_id, result, state, traceback=None, request=None, **kwargs):
        if request is not None and request.id == task_id:
            request.stored = state
        return super().store_result(task_id, result, state, traceback, request, **kwargs)

    def on_chord_part_return(self, request, state, result, **kwargs):
        """Let the chord await another part; when all have ended, send its body, at most once."""
        if request.chord and getattr(request, 'stored', None) != state:
            # The task ignores its result, but the chord's body takes it.
            self.store_result(request.id, result, state, request=request)
        if not (self.implements_incr and request.chord and request.group):
            return
        key = self.get_key_for_chord(request.group)
        awaited, etag = self.bucket.get(key)
        if awaited != request.id.encode():
            return
        group = self.restore_group(request.group) or []
        others = [task_id for task_id in find_tasks(group) if task_id != request.id]
        pending = []
        for _, pending in self._look(random.sample(others, len(others))):
            pass  # what counts is the last look
        successor = pending[0] if pending else os.urandom(16).hex()
        awaited, _ = self.bucket.put_if(key, successor.encode(), etag)
        if awaited != successor.encode():
            return  # a second delivery of this task went ahead
        if not pending:
            request.chord['chord_size'] = 1
            super().on_chord_part_return(request, state, result, **kwargs)
        elif self.get_state(successor) in states.READY_STATES:
            # It ended before it was awaited, and nobody else will come in its name.
            self.on_chord_part_return(Context(vars(request), id=successor), state, result)

    def chord_error_from_stack(self, callback, exc=None):
        super().chord_error_from_stack(callback, exc)
        # Where this body is itself a part of another chord, or a group of parts, that one is told.
        tasks = callback.tasks if callback.subtask_type == 'group' else [callback]
        for part in (task.options for task in tasks if task.options.get('chord')):
            fake = Context(part, id=part['task_id'], group=part['group_id'], stored='FAILURE')
            self.on_chord_part_return(fake, states.FAILURE, exc)


def find_tasks(results):
    """Yield the ids of all tasks of a group, those of groups inside it included."""
    for result in results:
        yield from (find_tasks(result) if hasattr(result, 'results') else [result.id])
