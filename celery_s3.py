"""Celery results in Amazon S3: one file on botocore, without boto3 and without a server.

    result_backend = 'celery_s3.S3Backend'
    CELERY_S3_BACKEND_SETTINGS = {'bucket': 'my-results'}

`Bucket` speaks signed S3 over HTTP; `S3Backend` maps Celery's contract onto a `Bucket`.
"""

import logging
import os
import random
import re
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from itertools import count, islice
from multiprocessing.pool import ThreadPool
from socket import IPPROTO_TCP, TCP_NODELAY

from botocore import auth, awsrequest, exceptions, httpsession, parsers, session, utils
from celery import canvas, states
from celery.backends.base import Context, KeyValueStoreBackend
from celery.exceptions import BackendStoreError, ImproperlyConfigured
from kombu.utils.encoding import bytes_to_str, ensure_bytes
from kombu.utils.functional import LRUCache

__all__ = ('Bucket', 'S3Backend')
__version__ = '2.0.0'
backends = sys.modules[f'{__name__}.backends'] = sys.modules[__name__]  # as in celery-s3 1.x
logger = logging.getLogger(__name__)

NO_INTERVAL = 0.5  # seconds; Celery's default for get(), taken for 'the caller has none'
FIRST_PAUSE = 0.5  # seconds between two looks, at first and after something became ready
LONGEST_PAUSE = 30  # seconds between two looks
LONGEST_SENDING = 30  # seconds; a live worker takes less to send the body of a chord
# HTTP statuses, and codes of https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
TRANSIENT = {409, 429, 500, 502, 503, 504, 'RequestTimeout', 'Throttling'}  # 409: others write
LOST = (exceptions.ConnectionError, exceptions.ConnectionClosedError, exceptions.ReadTimeoutError)
UNSAFE = re.compile(r'[\0-\x1f\x7f]|(^|/)\.\.?(/|$)')  # stores and proxies differ about such keys


# Errors
def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed when it is sent again."""
    if isinstance(error, exceptions.ClientError):
        status = error.response['ResponseMetadata']['HTTPStatusCode']
        return status in TRANSIENT or error.response.get('Error', {}).get('Code') in TRANSIENT
    return isinstance(error, LOST) and 'CERTIFICATE_VERIFY_FAILED' not in str(error)


@dataclass(repr=False)  # it would show secrets
class Bucket:
    """A folder of an S3 bucket, for the threads of one process; its parameters are the settings.

    Raises TypeError or ValueError for a wrong setting or an unsafe key, ClientError for what S3
    refuses, and botocore's connection errors."""

    bucket: str
    base_path: str = ''
    aws_region: str = ''
    aws_profile: str = ''
    aws_access_key_id: str = ''
    aws_secret_access_key: str = ''
    aws_session_token: str = ''
    endpoint_url: str = ''
    headers: dict = field(default_factory=dict)  # sent with each PUT
    conditional_writes: bool = True  # else Celery reads before it writes, and chords poll
    denied_is_missing: bool = False  # without s3:ListBucket, S3 answers 403 for a missing key
    max_connections: int = 50

    def __post_init__(self):
        for setting in fields(self):
            value = getattr(self, setting.name)
            # To Python, True is a whole number as well.
            if not isinstance(value, setting.type) or (value is True and setting.type is int):
                raise TypeError(f'{setting.name} must be of type {setting.type.__name__}')
        for text in (*self.headers, *self.headers.values()):
            if not (isinstance(text, str) and text.isascii() and text.isprintable()):
                raise TypeError('headers must be names and values of printable ASCII characters')
        keys = (self.aws_access_key_id, self.aws_secret_access_key)
        if any((*keys, self.aws_session_token)) and not all(keys):
            raise ValueError('aws_access_key_id and aws_secret_access_key go together')
        if self.max_connections < 1:
            raise ValueError('max_connections must be 1 or more')
        self._prefix = f'{self.base_path.strip("/")}/'.lstrip('/')
        if UNSAFE.search(self._prefix):
            raise ValueError("base_path must not hold '.', '..' or control characters")
        self.uri = f's3://{self.bucket}/{self._prefix}'
        self.etags = LRUCache(limit=10_000)  # by key, for callers of put_if()
        self._etag_forms = ['"{}"', '{}']  # AWS takes both, R2 the first one, Ceph 16 the other
        self._lock = threading.Lock()  # one thread at a time may look up a session's credentials
        self._session = session.Session(profile=self.aws_profile or None)
        if self.aws_access_key_id:
            self._session.set_credentials(*keys, self.aws_session_token)
        config = self._session.get_config_variable
        self._attempts = config('max_attempts') or 5  # AWS_MAX_ATTEMPTS, the first one included
        self._region = self.aws_region or config('region') or 'us-east-1'
        self._session.set_config_variable('region', self._region)  # STS is asked there, too
        self._root = self._find_root(config)
        self._http = httpsession.URLLib3Session(
            verify=config('ca_bundle') or os.environ.get('REQUESTS_CA_BUNDLE') or True,
            proxies=utils.get_environ_proxies(self._root),
            max_pool_connections=self.max_connections,
            socket_options=[(IPPROTO_TCP, TCP_NODELAY, 1)],  # Nagle's delay is 40 ms a PUT
        )

    # The verbs
    def get(self, key: str) -> tuple[bytes | None, str | None]:
        """The object's bytes and its etag, or None and None where there is no such key."""
        missing = {'NoSuchKey', 'AccessDenied'} if self.denied_is_missing else {'NoSuchKey'}
        return self._send('GET', key, missing)

    def put(self, key: str, value: bytes) -> None:
        """Write the object, whatever was there."""
        self._send('PUT', key, set(), value, self.headers)

    def put_if(self, key: str, value: bytes, etag: str | None) -> tuple[bytes | None, str | None]:
        """Write the object if it has this etag or, where the etag is None, if there is no object.

        Returns what is there then, as get() does: this value, or what others have written. Costs
        a PUT; one more until it is known how the store takes etags; a GET where it was refused.
        https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html"""
        forms = self._etag_forms if etag else ['*']
        refusals = {412, 'NoSuchKey'}
        for form in forms:
            condition = {'If-Match': form.format(etag)} if etag else {'If-None-Match': form}
            _, new_etag = self._send('PUT', key, refusals, value, self.headers | condition)
            if new_etag is not None:
                self._etag_forms = [form] if etag else self._etag_forms
                return value, new_etag
            refusals.add('InvalidArgument')  # R2's answer to an etag without quotes
        return self.get(key)

    def delete(self, key: str) -> None:
        """Delete the object, if there is one."""
        self._send('DELETE', key, {'NoSuchKey'})

    # The environment
    def _find_root(self, config) -> str:
        """The URL that all keys come after."""
        endpoint = self.endpoint_url
        if not endpoint and not config('ignore_configured_endpoint_urls'):
            endpoint = os.environ.get('AWS_ENDPOINT_URL_S3') or os.environ.get('AWS_ENDPOINT_URL')
        if endpoint:
            if not re.match('https?://[^/@]+(/|$)', endpoint):
                raise ValueError('endpoint_url must begin with http://HOST or https://HOST')
            return f'{endpoint.rstrip("/")}/{self.bucket}/'
        # Only the suffix depends on the partition; botocore's list begins with the public one.
        known = self._session.get_component('data_loader').load_data('partitions')['partitions']
        partition = next((p for p in known if re.match(p['regionRegex'], self._region)), known[0])
        fips = '-fips' if config('use_fips_endpoint') else ''
        dual_stack = '.dualstack' if config('use_dualstack_endpoint') else ''
        host = f's3{fips}{dual_stack}.{self._region}.{partition["outputs"]["dnsSuffix"]}'
        is_label = utils.check_dns_name(self.bucket)  # S3's certificate is for names without dots
        return f'https://{self.bucket}.{host}/' if is_label else f'https://{host}/{self.bucket}/'

    # Signing, and failures
    def _send(self, method, key, refusals, body=b'', put_headers=None):
        """The object's bytes and etag, or None and None if S3 answers with one of the refusals."""
        path = self._prefix + key
        if UNSAFE.search(path):
            raise ValueError(f"{path!r} has '.', '..' or control characters, not safe in a key")
        url = self._root + utils.percent_encode(path, safe='/-._~')
        operation = f'{method} {self.uri}{key}'
        for attempt in count(1):
            try:
                request = awsrequest.AWSRequest(method, url, put_headers, body)  # a new date
                return self._send_once(request, operation, refusals)
            except (exceptions.ClientError, *LOST) as error:
                if attempt >= self._attempts or not is_transient(error):
                    raise
                pause = random.uniform(0, min(0.1 * 2**attempt, 20))  # seconds
                logger.warning(f'{operation}: {error}; attempt {attempt + 1} in {pause:.1f} s')
                time.sleep(pause)

    def _send_once(self, request, operation, refusals):
        with self._lock:
            credentials = self._session.get_credentials()
        frozen = credentials and credentials.get_frozen_credentials()  # None: add_auth() raises
        auth.S3SigV4Auth(frozen, 's3', self._region).add_auth(request)
        try:
            answer = self._http.send(request.prepare())
        except exceptions.HTTPClientError as error:
            # botocore has wrapped what was raised in send(), a task's soft time limit as well.
            raise (error if isinstance(error, LOST) else error.kwargs['error']) from None
        status, headers, content = answer.status_code, answer.headers, answer.content
        if len(content) != int(headers.get('content-length', len(content))):
            raise exceptions.ConnectionClosedError(endpoint_url=f'{request.url} (cut short)')
        if request.method == 'PUT' and status == 200 and b'<Error' in content:
            status = 500  # AWS may fail after it has said 200
        if status < 300:
            return content, headers.get('etag', '').removeprefix('W/').strip('"')
        parse = parsers.create_parser('rest-xml').parse  # with no shape (None), it reads any error
        refusal = parse({'status_code': status, 'headers': headers, 'body': content}, None)
        if status in refusals or refusal.get('Error', {}).get('Code') in refusals:
            return None, None
        region = headers.get('x-amz-bucket-region', self._region)  # if not ours, set aws_region
        details = f'HTTP {status}, region {region}, request {headers.get("x-amz-request-id")}'
        raise exceptions.ClientError(refusal, f'{operation} ({details})')


class S3Backend(KeyValueStoreBackend):
    """Celery's results, groups and chords in a `Bucket`. Celery calls all that is not 'Ours'."""

    supports_result_compression = True  # the setting result_compression takes effect
    key_t = bytes_to_str  # keys are str (Celery's __init__ unbinds it)
    exception_safe_to_retry = staticmethod(is_transient)  # for result_backend_always_retry

    def __init__(self, app, *args, **kwargs):
        conf = app.conf  # with a namespace, as in Django, it has the second name
        given = conf.get('CELERY_S3_BACKEND_SETTINGS') or conf.get('s3_backend_settings') or {}
        try:
            # None and '' mean 'not set'; an unknown name is an error, whatever it is set to.
            unset = [name for name in Bucket.__annotations__ if given.get(name) in (None, '')]
            self._settings = {name: given[name] for name in given if name not in unset}
            self._buckets = {os.getpid(): Bucket(**self._settings)}
        except (AttributeError, TypeError, ValueError, exceptions.BotoCoreError) as error:
            known = f'a dict of {", ".join(Bucket.__annotations__)}'
            raise ImproperlyConfigured(f'CELERY_S3_BACKEND_SETTINGS, {known}: {error}') from error
        super().__init__(app, *args, **kwargs)  # after the bucket: it reads implements_incr
        self.thread_safe = True  # after super(), which resets it; else each thread has a backend

    @property
    def bucket(self) -> Bucket:
        """Ours: this process's own, as neither connections nor locks may cross a fork."""
        if os.getpid() not in self._buckets:
            self._buckets[os.getpid()] = Bucket(**self._settings)
        return self._buckets[os.getpid()]

    def as_uri(self, include_password: bool = False) -> str:
        return self.bucket.uri

    def get(self, key: bytes | str) -> bytes | None:
        return self.bucket.get(bytes_to_str(key))[0]

    def set(self, key: bytes | str, value: bytes | str) -> None:
        self.bucket.put(bytes_to_str(key), ensure_bytes(value))

    def delete(self, key: bytes | str) -> None:
        self.bucket.delete(bytes_to_str(key))

    def _start_threads(self, size: int):
        """Ours: a pool for so many looks at once; nothing for one, or where none can start."""
        size = min(size, self.bucket.max_connections)
        try:
            return ThreadPool(size) if size > 1 else nullcontext()
        except (RuntimeError, AttributeError) as error:  # the latter by ThreadPool's clean-up
            if type(error) is AttributeError and not isinstance(error.__context__, RuntimeError):
                raise (error.__context__ or error) from None  # a task's soft time limit
            return nullcontext()

    def _look(self, pool, look, ids: list, size: float, ready=states.READY_STATES):
        """Ours: look at `size` tasks at once, then at three times as many, until one is pending.

        Yield (id, meta) of those that are ready. The pending ones go to the list's end, where
        they hide nobody who is ready."""
        pending = []
        while ids and not pending:
            batch = ids[: max(1, int(size))]
            del ids[: len(batch)]
            look_at_all = pool.imap_unordered if pool and len(batch) > 1 else map
            for task_id, meta in look_at_all(lambda task_id: (task_id, look(task_id)), batch):
                if meta['status'] in ready:
                    yield task_id, meta
                else:
                    pending.append(task_id)
            size = 3 * len(batch)
        ids.extend(pending)

    # Storing: a state in one PUT that cannot replace a SUCCESS.

    def _store_result(self, task_id, result, state, traceback=None, request=None, **kwargs):
        if getattr(request, 'id', None) == task_id:  # not where a task stores another's state
            request.stored = state  # tells on_chord_part_return() that it need not
        if not self.bucket.conditional_writes:
            return super()._store_result(task_id, result, state, traceback, request, **kwargs)
        meta = self._get_result_meta(result, state, traceback, request)
        value = ensure_bytes(self.encode(meta | {'task_id': bytes_to_str(task_id)}))
        key = self.get_key_for_task(task_id)
        etag = self.bucket.etags.data.get(key)  # LRUCache.get() fails when another thread evicts
        for _ in range(20):  # each time, others have written it between our two requests
            found, etag = self.bucket.put_if(key, value, etag)
            if found == value and state != states.SUCCESS:  # which nothing replaces
                self.bucket.etags[key] = etag
            if found == value or (found and self.decode(found)['status'] == states.SUCCESS):
                return result
        raise BackendStoreError('others write it or hide it', state=state, task_id=task_id)

    # Waiting: the longer it takes, the less often it asks.

    supports_native_join = True  # groups are joined by iter_native(), not task by task

    def wait_for(self, task_id, timeout=None, interval=NO_INTERVAL, no_ack=True, on_interval=None):
        return next(self.get_many([task_id], timeout, interval, no_ack, None, on_interval))[1]

    def iter_native(self, result, *args, **kwargs):
        # join_native() calls get() on a group's results: so they come last, when all are ready.
        tasks = {task.id: task for task in find_tasks(result.results)}
        direct = {one.id for one in result.results}  # tasks, and groups
        for task_id, meta in self.get_many(tasks, *args, **kwargs):
            tasks[task_id]._maybe_set_cache(meta)  # which the task's own get() returns
            if task_id in direct:
                yield task_id, meta
        yield from ((one.id, one.results) for one in result.results if hasattr(one, 'results'))

    def get_many(self, task_ids, timeout=None, interval=NO_INTERVAL, no_ack=True, on_message=None,
            on_interval=None, max_iterations=None, READY_STATES=states.READY_STATES):  # fmt: skip
        """Yield (task id, meta) of each task once it is ready, in whatever order they end."""
        ids = list(dict.fromkeys(map(bytes_to_str, task_ids)))
        latest = time.monotonic()  # when something last became ready, or the beginning
        deadline = float('inf') if timeout is None else latest + timeout
        pause = FIRST_PAUSE if interval in (None, NO_INTERVAL) else interval
        with self._start_threads(len(ids)) as pool:
            for _ in islice(count(), max_iterations or None):  # None: without end
                whole = max_iterations or len(ids) == 1 or time.monotonic() >= deadline
                size = len(ids) if whole else 2 * pause  # two looks a second, as Celery's
                for task_id, meta in self._look(pool, self.get_task_meta, ids, size, READY_STATES):
                    self._cache[task_id] = meta  # as Celery's own, where result_cache_max is set
                    if on_message is not None:
                        on_message(meta)
                    yield task_id, meta
                    latest = time.monotonic()
                if not ids:
                    return
                if whole and time.monotonic() >= deadline:
                    raise self.TimeoutError(f'The operation timed out ({timeout})')
                if interval in (None, NO_INTERVAL):  # the caller has none of its own
                    pause = min(max(FIRST_PAUSE, (time.monotonic() - latest) / 10), LONGEST_PAUSE)
                time.sleep(max(0, min(pause, deadline - time.monotonic())))
                if on_interval:
                    on_interval()  # before the next look: a parent's own error comes first

    # Chords: without polling; a note in S3 says which part goes on.

    implements_incr = property(lambda self: self.bucket.conditional_writes)  # else Celery polls
    incr = staticmethod(lambda key: 1)  # Celery counts the ended parts up to chord_size, here 1
    _found = {}  # Ours: a chord's group and its parts' metas, by id, for Celery's join

    def _apply_chord_incr(self, header_result_args, body, **kwargs):
        group_id, results = header_result_args
        *_, last = find_tasks(results)
        body.options['note'] = group_id  # each part receives this body as request.chord
        # The note begins as the last part's id: mostly they end in order, and the others leave.
        self.bucket.put_if(self.get_key_for_chord(group_id), last.id.encode(), None)
        super()._apply_chord_incr(header_result_args, body, **kwargs)  # saves the group

    def on_chord_part_return(self, request, state, result, **kwargs):
        if not isinstance(request.chord, dict) or not request.id:
            return  # Celery asks about tasks that are in no chord, too
        if getattr(request, 'stored', None) != state:  # ignore_result, but the body needs it
            self.store_result(request.id, result, state, request=request)
        body = dict(request.chord, options=dict(request.chord.get('options') or {}), chord_size=1)
        group_id = body['options'].pop('note', None)  # none where the client lets the chord poll
        if group_id and self.implements_incr and self._go_on(request.id, group_id, body):
            part = Context(id=request.id, group=group_id, chord=body)  # all that super() reads
            request.chord = None  # what fails from here on must not report the part once more
            try:
                super().on_chord_part_return(part, state, result, **kwargs)
            finally:
                self._found = {}

    def _go_on(self, part: str, group_id: str, body: dict) -> bool:
        """Ours: whether all parts have ended, and this delivery of one is to send the body.

        The note is 'LAST', 'MINE awaits THAT' or 'MINE sends NONCE', a word a line. All but NONCE
        are ids of parts: one that has ended and finds its id there goes on with the chord."""
        key = self.get_key_for_chord(group_id)
        note, etag = self.bucket.get(key)
        words = (note or b'').decode().split('\n')
        if part not in words:
            return False
        body_id = body['options'].get('task_id')
        # Where an earlier delivery sends the body, its worker may have died before it did.
        for seconds in (0, LONGEST_SENDING) if words[1:2] == ['sends'] else ():
            time.sleep(seconds)
            has_begun = body_id and self.get_state(body_id) != states.PENDING
            if has_begun or self.restore_group(group_id, cache=False) is None:
                return False  # once the body is sent, Celery deletes the group
        group = self.restore_group(group_id, cache=False)
        tasks = [task.id for task in find_tasks(group.results if group else [])]
        ids = random.sample(tasks, len(tasks))  # in one order, all would look at the same first
        found = {group_id: group}
        while True:
            with self._start_threads(len(ids)) as pool:
                found.update(self._look(pool, self._look_at_part, ids, 1))
            words = ['awaits', ids[-1]] if ids else ['sends', os.urandom(16).hex()]
            note = '\n'.join([part, *words]).encode()
            there, etag = self.bucket.put_if(key, note, etag)
            if there != note:
                return False  # another part, or another delivery of this one, went ahead
            if not ids:
                self._found = found
                return True
            # The awaited one may have read the older note and gone: if it has ended, we go on.
            if self._look_at_part(ids[-1])['status'] not in states.READY_STATES:
                return False

    def restore_group(self, group_id, cache=True):
        return self._found.get(group_id) or super().restore_group(group_id, cache)

    def get_task_meta(self, task_id, cache=True):
        return self._found.get(task_id) or super().get_task_meta(task_id, cache)

    def _look_at_part(self, task_id: str) -> dict:  # Ours: get_task_meta() would raise or cache
        value = self.get(self.get_key_for_task(task_id))
        try:
            return self.decode_result(value) if value else {'status': states.PENDING}
        except Exception as error:  # whatever a serializer raises: the chord fails with it
            return {'status': states.FAILURE, 'result': error}

    def chord_error_from_stack(self, callback, exc=None):
        """The body will not be sent, because a part has failed: so it has failed, too."""
        # Before Celery 5.6, a chain has no id, by which super() stores the error.
        callback.options.setdefault('task_id', next(iter(find_ends(callback)), callback).id)
        super().chord_error_from_stack(callback, exc)
        self._fail_ends(callback, exc)

    def _fail_chain(self, chain, exc, *args, **kwargs):
        """A task has failed: so those that are chained after it have failed, too."""
        super()._fail_chain(chain, exc, *args, **kwargs)
        if isinstance(chain, list) and chain:  # else None, or an odd message's
            self._fail_ends(canvas.maybe_signature(chain[0], self.app), exc)  # last first

    def _fail_ends(self, signature, exc):
        """Ours: store the error of each task that this ends with, and tell the task's chord.

        Celery leaves out those in groups and chords. And where an error is stored already, it does
        not tell the chord, although a worker may have died between the two."""
        for task in filter(lambda task: task.id, find_ends(signature)):
            request = Context(task.options, id=task.id, stored=states.FAILURE)  # not once more
            is_stored = self.get_state(task.id) in states.READY_STATES
            self.mark_as_failure(task.id, exc, request=request, store_result=not is_stored)


def find_tasks(results: list):
    """Yield the results of all single tasks, those in groups inside of groups as well."""
    for result in results:
        yield from find_tasks(result.results) if hasattr(result, 'results') else [result]


def find_ends(signature) -> list:
    """The tasks whose results are those of a task, group, chain or chord."""
    while signature.subtask_type in ('chain', 'chord'):
        signature = signature.body if signature.subtask_type == 'chord' else signature.tasks[-1]
    if signature.subtask_type != 'group':
        return [signature]
    return [end for task in signature.tasks for end in find_ends(task)]
