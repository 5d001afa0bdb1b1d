"""Celery results in Amazon S3: one file on botocore, without boto3 and without a server.

    app.conf.result_backend = 'celery_s3.S3Backend'
    app.conf.s3_backend_settings = {'bucket': 'my-results'}

`Bucket` speaks signed S3 over HTTP. `S3KeyValueBackend` is a whole backend on it, with Celery's
own ways of storing, waiting and running chords. Three subclasses improve on one of these each, and
know nothing of each other; `S3Backend` joins them. To do without one, take its name out there."""

import json
import logging
import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain, count, islice
from socket import IPPROTO_TCP, TCP_NODELAY
from urllib.parse import quote

from botocore import auth, awsrequest, exceptions, httpsession, parsers, session, utils
from celery import canvas, states, uuid
from celery.backends.base import Context, KeyValueStoreBackend
from celery.exceptions import BackendStoreError, ChordError, ImproperlyConfigured, OperationalError
from celery.result import result_from_tuple
from kombu.utils.encoding import bytes_to_str, ensure_bytes, safe_repr
from kombu.utils.functional import retry_over_time

# What this module relies on though it is not public, or is documented nowhere:
# - Celery (seen in 5.4.0, 5.5.3, 5.7.0): the methods that are overridden here (all without an
#   underscore but `bucket`; `_store_result`; `_fail_chain`, new in 5.7); `_get_result_meta`;
#   `_maybe_set_cache` and `_cache` of results; that requests take attributes; that a chord's parts
#   are published after apply_chord() and carry the body that it was given.
# - botocore (seen in 1.31.62, 1.44.8): `URLLib3Session` and its `socket_options`, the `kwargs` of
#   its errors, the 'rest-xml' parser without a shape, the `outputs` of the partitions.
__version__ = '2.0.0'
backends = sys.modules[f'{__name__}.backends'] = sys.modules[__name__]  # as in celery-s3 1.x
logger = logging.getLogger(__name__)
# What may pass. 409: others write this key now; no credentials: a metadata service is busy.
# https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
TRANSIENT_STATUSES = {409, 429, 500, 502, 503, 504}
TRANSIENT_CODES = {'RequestTimeout', 'SlowDown', 'Throttling'}
TRANSIENT_ERRORS = (exceptions.ConnectionError, exceptions.ConnectionClosedError,
    exceptions.ReadTimeoutError, exceptions.NoCredentialsError,
    exceptions.CredentialRetrievalError, exceptions.MetadataRetrievalError)  # fmt: skip
# What is pasted into a URL or a header has to be what it says it is: a pattern and its meaning.
PRINTABLE = ('([!-~]([ -~]*[!-~])?)?', 'printable ASCII, with no space or newline at its ends')
HOST = r'https?://([\w.-]+|\[[\da-fA-F:.]+\])(:\d{1,5})?'
RULES = {  # no directory buckets, NAME--ZONE--x-s3, which have other hosts and signatures
    'bucket': (r'(?!.*--\w+-s3$|\.\.?$)[\w.-]{1,255}', 'a name or an alias, no URL and no ARN'),
    'base_path': (r'(?!(.*/)?\.\.?(/|$))[^\0-\x1f\x7f]*', "without '.', '..', control characters"),
    'aws_region': (r'[\w-]{1,63}', 'a name such as us-east-1'),
    'endpoint_url': (rf'({HOST}(/[\w.~/-]*)?)?', 'http://HOST or https://HOST, or with a port'),
    'max_connections': (r'[1-9]\d*', 'a whole number, 1 or more'),
}


# Errors
def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed when it is sent again."""
    if isinstance(error, exceptions.ClientError):
        status = error.response.get('ResponseMetadata', {}).get('HTTPStatusCode')
        return status in TRANSIENT_STATUSES or error.response['Error']['Code'] in TRANSIENT_CODES
    return isinstance(error, TRANSIENT_ERRORS) and 'CERTIFICATE_VERIFY_FAILED' not in str(error)


class Bucket:
    """A folder of an S3 bucket, for all threads of one process. Its parameters are the settings;
    None and '' mean 'not set'. Raises ValueError for a wrong one, ClientError for what S3 refuses,
    botocore's other errors where S3 is out of reach, and what a signal's handler raises."""

    bucket: str = ''
    base_path: str = ''
    aws_region: str = ''
    aws_profile: str = ''
    aws_access_key_id: str = ''
    aws_secret_access_key: str = ''
    aws_session_token: str = ''
    endpoint_url: str = ''
    headers: dict  # sent with each PUT; none where it is not set
    conditional_writes: bool = (
        True  # else, for stores without them, storing and chords are Celery's
    )
    denied_is_missing: bool = False  # without s3:ListBucket, S3 answers 403 for a missing key
    max_connections: int = 50  # and threads of run()

    def __init__(self, **settings):
        known = Bucket.__annotations__
        unknown = [name for name in settings if name not in known]
        settings = {name: value for name, value in settings.items() if value not in (None, '')}
        vars(self).update({'headers': {}, **settings})
        del settings  # what follows may fail, and tracebacks show what is in variables
        if unknown:
            raise TypeError(f'unknown setting {unknown[0]!r}; known are {", ".join(known)}')
        self._session = session.Session(profile=self.aws_profile or None)
        config = self._session.get_config_variable
        self.aws_region = self.aws_region or config('region') or 'us-east-1'
        if not self.endpoint_url and not config('ignore_configured_endpoint_urls'):
            for name in 'AWS_ENDPOINT_URL', 'AWS_ENDPOINT_URL_S3':
                self.endpoint_url = os.getenv(name) or self.endpoint_url
        self._check()
        if self.aws_access_key_id:
            self._session.set_credentials(self.aws_access_key_id, self.aws_secret_access_key,
                self.aws_session_token)  # fmt: skip
        self._session.set_config_variable('region', self.aws_region)  # STS is asked there, too
        self._prefix = f'{self.base_path.strip("/")}/'.lstrip('/')
        self.uri = f's3://{self.bucket}/{self._prefix}'
        self._root = self._find_root(config)
        self._attempts = config('max_attempts') or 5  # AWS_MAX_ATTEMPTS, the first one included
        self._etag_forms = ['"{}"', '{}']  # AWS takes both, R2 the first one, Ceph 16 the other
        self._http = httpsession.URLLib3Session(
            verify=config('ca_bundle') or os.getenv('REQUESTS_CA_BUNDLE') or True,
            proxies=utils.get_environ_proxies(self._root),
            max_pool_connections=self.max_connections,
            socket_options=[(IPPROTO_TCP, TCP_NODELAY, 1)],  # Nagle's delay is 40 ms a PUT
        )
        self._lock = threading.Lock()  # one thread at a time may look up a session's credentials
        self._threads = ThreadPoolExecutor(self.max_connections)  # which starts none yet

    def _check(self) -> None:
        for name, kind in Bucket.__annotations__.items():  # and no value in a variable, either
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f'{name} must be of type {kind.__name__}')
            pattern, meaning = RULES.get(name, PRINTABLE)
            if not re.fullmatch(pattern, str(getattr(self, name)), re.ASCII):  # a number as well
                raise ValueError(f'{name} must be {meaning}')
        texts = chain(self.headers, self.headers.values())  # this shows no value, either
        if not all(isinstance(one, str) and re.fullmatch(PRINTABLE[0], one) for one in texts):
            raise ValueError(f'headers must be names and values of {PRINTABLE[1]}')
        is_pair = bool(self.aws_access_key_id) == bool(self.aws_secret_access_key)
        if not is_pair or (self.aws_session_token and not self.aws_access_key_id):
            raise ValueError('aws_access_key_id and aws_secret_access_key go together')

    # The verbs
    def get(self, key: str) -> tuple[bytes | None, str | None]:
        """The object's bytes and its etag, or None and None where there is no such key."""
        missing = ('NoSuchKey', 'AccessDenied') if self.denied_is_missing else ('NoSuchKey',)
        return self._send('GET', key, missing)

    def put(self, key: str, value: bytes) -> None:
        """Write the object, whatever was there."""
        self._send('PUT', key, (), value, self.headers)

    def put_if(self, key: str, value: bytes, etag: str | None) -> tuple[bytes | None, str | None]:
        """Write the object if it has this etag or, where the etag is None, if there is no object.
        Returns what is there then, as get() does: this value, or what others have written. Costs
        a PUT; one more until it is known how the store takes etags; a GET where it was refused.
        https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html"""
        refusals = ['PreconditionFailed', '412', 'NoSuchKey']  # '412': the first, without a body
        name = 'If-None-Match' if etag is None else 'If-Match'
        for form in ['*'] if etag is None else self._etag_forms:
            condition = {name: form.format(etag)}
            _, new_etag = self._send('PUT', key, refusals, value, self.headers | condition)
            if new_etag is not None:
                self._etag_forms = self._etag_forms if etag is None else [form]
                return value, new_etag
            refusals.append('InvalidArgument')  # R2's answer to an etag without quotes
        # Refused: by what others wrote, or by this value, if it was written but the answer lost.
        return self.get(key)

    def delete(self, key: str) -> None:
        """Delete the object, if there is one."""
        self._send('DELETE', key, ('NoSuchKey',))

    def run(self, function: Callable, items: list) -> Iterator[tuple]:
        """Yield (item, function(item)) in order. Several run at once, in `max_connections` threads
        that all callers share; an error is raised while others still run. The function only reads:
        where threads run out, it may be called for an item twice."""
        values = map(function, items)  # one after the other
        if len(items) > 1:
            with suppress(RuntimeError):  # from then on one after the other: no thread can start
                values = self._threads.map(function, items)
        yield from zip(items, values)

    # The environment
    def _find_root(self, config: Callable) -> str:  # the URL that all keys come after
        if self.endpoint_url:
            return f'{self.endpoint_url.rstrip("/")}/{self.bucket}/'
        # Only the suffix depends on the partition; botocore's list begins with the public one.
        known = self._session.get_component('data_loader').load_data('partitions')['partitions']
        found = next((p for p in known if re.match(p['regionRegex'], self.aws_region)), known[0])
        fips = '-fips' if config('use_fips_endpoint') else ''
        dual_stack = '.dualstack' if config('use_dualstack_endpoint') else ''
        host = f's3{fips}{dual_stack}.{self.aws_region}.{found["outputs"]["dnsSuffix"]}'
        is_label = utils.check_dns_name(self.bucket)  # S3's certificate is for names without dots
        return f'https://{self.bucket}.{host}/' if is_label else f'https://{host}/{self.bucket}/'

    # Signing, and failures
    def _send(self, method, key, refusals, body=b'', put_headers=None):
        """The object's bytes and etag, or None and None if S3 answers with one of the refusals."""
        url = self._root + quote(self._prefix + key, safe='/-._~', errors='backslashreplace')
        operation = f'{method} {self.uri}{key}'
        for attempt in count(1):
            try:
                request = awsrequest.AWSRequest(method, url, put_headers, body)  # a new date
                return self._send_once(request, operation, refusals)
            except (exceptions.ClientError, *TRANSIENT_ERRORS) as error:
                if attempt >= self._attempts or not is_transient(error):
                    raise
                is_answer = isinstance(error, exceptions.ClientError)
                code = error.response['Error']['Code'] if is_answer else type(error).__name__
                # A store that answers has too much to do: it needs longer than a lost connection.
                first = 1.0 if is_answer else 0.2  # seconds
                # Random, so that not all come back at once; the inner min() prevents an overflow.
                pause = random.uniform(0, min(first * 2 ** min(attempt - 1, 7), 20))
                logger.warning('%s: %s; attempt %d in %.1f s', operation, code, attempt + 1, pause)
            time.sleep(pause)

    def _send_once(self, request, operation, refusals):
        answer = self._exchange(request)
        status = answer.status_code
        if len(answer.content) != int(answer.headers.get('content-length', len(answer.content))):
            raise exceptions.ConnectionClosedError(endpoint_url=f'{request.url} (cut short)')
        if request.method == 'PUT' and status == 200 and b'<Error' in answer.content:
            status = 500  # AWS may fail after it has said 200
        if status < 300:
            return answer.content, answer.headers.get('etag', '').removeprefix('W/').strip('"')
        refusal = read_refusal(answer, status)
        if refusal['Error']['Code'] in refusals:
            return None, None
        details = f'HTTP {status}, region {self.aws_region}'
        for name in 'x-amz-bucket-region', 'x-amz-request-id':
            if name in answer.headers:
                details += f', {name} {answer.headers[name]}'
        raise exceptions.ClientError(refusal, f'{operation} ({details})')

    def _exchange(self, request):
        try:
            self._sign(request)
            return self._http.send(request.prepare())
        except BaseException as error:
            # This very class is what botocore wraps others in, such as a task's soft time limit.
            failure = error.kwargs['error'] if type(error) is exceptions.HTTPClientError else error
        # Tracebacks show what is in variables: cut off the frames that hold keys and signatures.
        raise failure.with_traceback(None) from None

    def _sign(self, request):
        with self._lock:
            credentials = self._session.get_credentials()
        frozen = credentials and credentials.get_frozen_credentials()  # None: add_auth() raises
        if not all(re.fullmatch(PRINTABLE[0], text or '') for text in frozen or ()):
            raise exceptions.InvalidConfigError(error_msg=f'credentials: not {PRINTABLE[1]}')
        auth.S3SigV4Auth(frozen, 's3', self.aws_region).add_auth(request)


def read_refusal(answer, status: int) -> dict:
    """What ClientError takes of an answer, without what S3 repeats of the signed headers."""
    given = {'status_code': status, 'headers': answer.headers, 'body': answer.content}
    parsed = parsers.create_parser('rest-xml').parse(given, None)  # None: an error of any shape
    found = parsed.get('Error', {})
    error = {'Code': found.get('Code') or str(status), 'Message': found.get('Message', '')}
    return {'Error': error, 'ResponseMetadata': parsed['ResponseMetadata']}


class S3KeyValueBackend(KeyValueStoreBackend):
    """A whole backend, with Celery's own ways of storing, waiting and running chords."""

    supports_result_compression = True  # the setting result_compression takes effect
    exception_safe_to_retry = staticmethod(is_transient)  # for result_backend_always_retry

    def __init__(self, app, *args, **kwargs):
        super().__init__(app, *args, **kwargs)
        self.thread_safe = True  # after super(), which resets it; else each thread has a backend
        # The second name is that of lower-case settings, and that of a namespace, as in Django.
        name, other = 'CELERY_S3_BACKEND_SETTINGS', 's3_backend_settings'
        self._settings = app.conf.get(name) or app.conf.get(other) or {}
        try:
            self._buckets = {os.getpid(): Bucket(**self._settings)}
        except (TypeError, ValueError, exceptions.BotoCoreError) as error:
            raise ImproperlyConfigured(f'{name}: {error}') from None  # botocore's frames hold keys

    def get(self, key: bytes | str) -> bytes | None:
        return self.bucket.get(self.key_t(key))[0]

    def set(self, key: bytes | str, value: bytes | str) -> None:
        self.bucket.put(self.key_t(key), ensure_bytes(value))

    def delete(self, key: bytes | str) -> None:
        self.bucket.delete(self.key_t(key))

    def mget(self, keys: list) -> dict:
        return dict(self.bucket.run(self.get, keys))

    def as_uri(self, include_password: bool = False) -> str:
        return self.bucket.uri

    @staticmethod
    def key_t(key) -> str:  # an id may be bytes, a UUID or, in an odd message, anything
        return bytes_to_str(key) if isinstance(key, bytes) else str(key)

    @property
    def bucket(self) -> Bucket:  # this process's own: no connection or lock may cross a fork
        if os.getpid() not in self._buckets:
            self._buckets.setdefault(os.getpid(), Bucket(**self._settings))
        return self._buckets[os.getpid()]


# Storing
class S3StoringBackend(S3KeyValueBackend):
    """Stores a state by one PUT, which cannot replace a SUCCESS. Celery's own way reads first, and
    replaces a SUCCESS that is stored after its reading."""

    def _store_result(self, task_id, result, state, traceback=None, request=None, **kwargs):
        if not self.bucket.conditional_writes:
            return super()._store_result(task_id, result, state, traceback, request, **kwargs)
        meta = self._get_result_meta(result, state, traceback, request)
        value = ensure_bytes(self.encode(meta | {'task_id': self.key_t(task_id)}))
        is_own = getattr(request, 'id', None) == task_id  # else another task's state
        etag = getattr(request, '_celery_s3_etag', None) if is_own else None  # of its last state
        for attempt in range(20):
            found, etag = self.bucket.put_if(self.get_key_for_task(task_id), value, etag)
            if found == value and is_own and state != states.SUCCESS:  # which nothing may replace
                request._celery_s3_etag = etag
            if found == value or (found and self.decode(found)['status'] == states.SUCCESS):
                return result
            # Others have written. Where they do so twice, a state that is not final counts as
            # written just before theirs: many tasks may report progress on their parent's id.
            if attempt > 0 and state not in states.READY_STATES:
                return result
        problem = 'others store states of this task all the time, or s3:GetObject is not allowed'
        raise BackendStoreError(problem, state=state, task_id=task_id)


# Waiting
def find_tasks(results: list) -> Iterator:  # those of single tasks, in groups within groups, too
    for result in results:
        yield from find_tasks(result.results) if hasattr(result, 'results') else [result]


def look_until_pending(bucket: Bucket, look: Callable, ids: list, size: int) -> Iterator[tuple]:
    """Look at `size` tasks, then at three times as many, until one is pending. Yields id, meta."""
    pending = []
    while ids and not pending:
        for task_id, meta in bucket.run(look, ids[:size]):
            if meta['status'] not in states.READY_STATES:
                pending.append(task_id)
            yield task_id, meta
        ids = ids[size:]
        size *= 3


class S3WaitingBackend(S3KeyValueBackend):
    """Asks less often the longer a task takes, and for many at once. Celery's own way does not."""

    supports_native_join = True  # so a group's get() calls iter_native()

    def wait_for(self, task_id, timeout=None, interval=0.5, no_ack=True, on_interval=None):
        return next(self.get_many([task_id], timeout, interval, no_ack, None, on_interval))[1]

    def get_many(self, task_ids, timeout=None, interval=0.5, no_ack=True, on_message=None,
            on_interval=None, max_iterations=None, READY_STATES=states.READY_STATES):  # fmt: skip
        """Yield the id and the meta of each task as soon as it is ready. Raises TimeoutError."""
        waiting = dict.fromkeys(map(bytes_to_str, task_ids))  # a set that keeps its order
        latest = time.monotonic()  # when something became ready, or the beginning
        deadline = float('inf') if timeout is None else latest + timeout
        for _ in islice(count(), max_iterations or None):  # without end where it is None
            ids = list(waiting)
            growing = min(max(0.5, (time.monotonic() - latest) / 10), 30)  # seconds
            pause = growing if interval in (None, 0.5) else interval  # 0.5: the caller gave none
            is_whole = max_iterations or time.monotonic() >= deadline  # a look at all of them
            size = len(ids) if is_whole else max(1, int(2 * pause))  # so two GETs a second
            for task_id, meta in look_until_pending(self.bucket, self.get_task_meta, ids, size):
                del waiting[task_id]
                if meta['status'] not in READY_STATES:
                    waiting[task_id] = None  # at the end, where it keeps no other one back
                    continue
                if on_message is not None:
                    on_message(meta)
                yield task_id, meta
                latest = time.monotonic()  # without the time that the caller took
            if not waiting:
                return
            # Time is up only after a look at all, so that none that is ready is kept back.
            if size >= len(ids) and time.monotonic() >= deadline:
                raise self.TimeoutError(f'The operation timed out ({timeout})')
            time.sleep(max(0, min(pause, deadline - time.monotonic())))
            if on_interval is not None:
                on_interval()  # it may raise the error of a task's parent

    def iter_native(self, result, timeout=None, interval=0.5, no_ack=True, on_message=None,
            on_interval=None):  # fmt: skip
        """Yield (id, meta) of each task, then (id, results) of each group in the set, to Celery's
        join_native(). It calls get() on these results, which have got their metas by then."""
        members = {member.id for member in result.results}  # join_native() has one place an id
        if len(members) < len(result.results):
            raise ValueError('an id stands twice in this set: use join() in place of get()')
        tasks = {task.id: task for task in find_tasks(result.results)}
        known = {task_id: tasks[task_id]._cache for task_id in tasks if tasks[task_id]._cache}
        unknown = [task_id for task_id in tasks if task_id not in known]
        found = self.get_many(unknown, timeout, interval, no_ack, on_message, on_interval)
        for task_id, meta in chain(known.items(), found):
            if task_id not in known:
                tasks[task_id]._maybe_set_cache(meta)
            if task_id in members:
                yield task_id, meta
        yield from ((one.id, one.results) for one in result.results if hasattr(one, 'results'))


# Chords
LONGEST_SENDING = 30  # seconds; a worker that lives takes less to send the body of a chord
CHORD_ID = 'celery_s3_chord_id'  # an option of the body, by which the parts find the note


def find_ends(signature) -> list:
    """The tasks whose results are the result of this task, group, chain or chord."""
    signature = canvas.maybe_signature(signature)  # a dict, where it comes from a message
    while signature.subtask_type in ('chain', 'chord'):
        inner = signature.body if signature.subtask_type == 'chord' else signature.tasks[-1]
        signature = canvas.maybe_signature(inner)
    if signature.subtask_type == 'group':
        return [end for task in signature.tasks for end in find_ends(task)]
    return [signature]


def join(results: list, found: dict) -> list:
    """What was found for each of the results, in lists within lists where groups are in groups."""
    return [join(r.results, found) if hasattr(r, 'results') else found[str(r.id)] for r in results]


class S3ChordBackend(S3KeyValueBackend):
    """Runs chords without polling: an object in S3, the note, says who goes on with the chord.
    (Parts are the tasks that give its header's results; the body takes these. Celery's own way is
    a task that looks at all parts every second.) A record keeps the header's GroupResult.
    The note is one of these:
    {"next": ["LAST"]}, by the client, before it publishes the header: the last part goes on when
        it has ended. Parts mostly end in order; then the others have nothing more to do.
    {"next": ["MINE", "OTHER"]}, by part MINE, which has ended and found OTHER pending: OTHER goes
        on when it has ended; and MINE, if its worker dies now and it is delivered again.
    {"next": ["MINE"], "sender": NONCE}, by MINE, which has found that all have ended: it sends the
        body, and then deletes the record and the note.

    A part that ends stores its result and then reads the note. If its id is there, it looks at the
    others and writes the second or the third form, on condition that the note is still the one it
    has read. Of several that write at once, one succeeds and goes on. (Two deliveries of MINE may
    write the same second form; this does no harm, as their third forms differ.)

    No part is overlooked: MINE writes that it awaits OTHER, and then looks at OTHER's result once
    more; OTHER stores its result, and then reads the note. In S3 a read sees all earlier writes,
    so one of the two sees what the other one wrote. If both do, one write succeeds.

    No death loses a chord, if the broker delivers the part again (task_acks_late): it finds its id
    in the note and goes on. If it finds a sender, that was an earlier delivery of this very part.
    If that has sent the body, the body shows a state or the record is gone; else it gets 30 s for
    it. So the body is sent twice only if a worker died between sending it and deleting the record,
    and the body has stored no state since."""

    def apply_chord(self, header_result_args, body, **kwargs):
        """Write note and record; a starter that was delivered again keeps the note that it finds.
        It may overlap the chord's end: as the record is written last and deleted first, a record
        may stay behind, but never a note without one, with which a part would fail the body."""
        if not self.bucket.conditional_writes:
            return super().apply_chord(header_result_args, body, **kwargs)
        header = self.app.GroupResult(*header_result_args)
        *_, last = (str(task.id) for task in find_tasks(header.results))
        chord_id = f'{header.id}.{last}'  # the user may save the header by its id, or reuse that
        body.options[CHORD_ID] = chord_id  # each part receives this body as request.chord
        note = json.dumps({'next': [last]}).encode()
        self.bucket.put_if(self.get_key_for_chord(chord_id), note, None)
        self.save_group(chord_id, header)
        logger.debug('chord %s: begun, %s goes on', chord_id, last)

    def store_result(self, task_id, result, state, traceback=None, request=None, **kwargs):
        """As Celery's, but the request remembers what was stored, for on_chord_part_return()."""
        stored = super().store_result(task_id, result, state, traceback, request, **kwargs)
        if getattr(request, 'id', None) == task_id:  # else it is another task's state
            request._celery_s3_state = state
        return stored

    def on_chord_part_return(self, request, state, result, **kwargs):
        """A task has ended; Celery also asks about tasks that are in no chord."""
        if not isinstance(request.chord, dict) or not request.id:
            return
        # Celery has stored the result, unless it is to be ignored. But the body needs it.
        if getattr(request, '_celery_s3_state', None) != state:
            self.store_result(request.id, result, state, request=request)
        options = request.chord.get('options')
        if isinstance(options, dict) and options.get(CHORD_ID):  # else the chord polls
            self._go_on(str(request.id), options[CHORD_ID], request.chord)

    def _go_on(self, part: str, chord_id: str, body: dict) -> None:  # the class says why
        key = self.get_key_for_chord(chord_id)
        value, etag = self.bucket.get(key)
        note = json.loads(value or '{"next": []}')  # there is none once the body was sent
        if part not in note['next']:
            return logger.debug('chord %s: %s leaves it to %s', chord_id, part, note['next'])
        record = self.get(self.get_key_for_group(chord_id))
        # An earlier delivery of this part began to send the body; perhaps its worker has died.
        if 'sender' in note and record is not None and not self._has_begun(body):
            logger.info('chord %s: %s waits %d s', chord_id, part, LONGEST_SENDING)
            time.sleep(LONGEST_SENDING)
            record = self.get(self.get_key_for_group(chord_id))
        if 'sender' in note and (record is None or self._has_begun(body)):
            return
        ids = []
        with suppress(ChordError):  # with which _end() will fail the body
            results = self._read(chord_id, record)
            ids = list(dict.fromkeys(str(task.id) for task in find_tasks(results)))
        metas = {}
        while True:
            random.shuffle(ids)  # else each part that goes on looks at the same ready ones first
            looked = dict(look_until_pending(self.bucket, self._look_at_part, ids, 1))
            metas.update(looked)
            pending = [one for one in looked if looked[one]['status'] not in states.READY_STATES]
            ids = [one for one in ids if one not in looked] + pending
            note = {'next': [part, *pending[:1]]}
            if not pending:
                note['sender'] = uuid()  # which differs from that of another delivery
            value = json.dumps(note).encode()
            found, etag = self.bucket.put_if(key, value, etag)
            logger.debug('chord %s: %s writes %s, finds %s', chord_id, part, value, found)
            if found != value:  # others, or another delivery of this part, have gone on
                return
            if not pending:
                return self._end(chord_id, body, record, metas)
            # The awaited one may have read the older note and left: then this one goes on.
            if self._look_at_part(pending[0])['status'] not in states.READY_STATES:
                return

    def _has_begun(self, body: dict) -> bool:
        body_id = body['options'].get('task_id')
        return body_id is not None and self.get(self.get_key_for_task(body_id)) is not None

    def _read(self, chord_id: str, record: bytes | None) -> list:  # what the parts give
        if record is None:
            raise ChordError(f'GroupResult {chord_id} no longer exists')
        try:
            return result_from_tuple(self.decode(record)['result'], self.app).results
        except Exception as error:
            raise ChordError(f'Cannot restore group: {error!r}') from error

    def _look_at_part(self, task_id: str) -> dict:  # a result that none can decode is an error
        value = self.get(self.get_key_for_task(task_id))
        try:
            return self.decode_result(value) if value else {'status': states.PENDING}
        except Exception as error:
            return {'status': states.FAILURE, 'result': error}

    def _end(self, chord_id: str, body: dict, record: bytes | None, metas: dict) -> None:
        """Send the body with the parts' values, or fail it; then delete record and note."""
        options = {name: body['options'][name] for name in body['options'] if name != CHORD_ID}
        body = canvas.maybe_signature({**body, 'options': options}, app=self.app)
        try:
            results = self._read(chord_id, record)
            values = {task_id: metas[task_id]['result'] for task_id in metas}
            for part in (str(task.id) for task in find_tasks(results)):
                if metas[part]['status'] in states.PROPAGATE_STATES:
                    error = values[part]  # it may be any BaseException
                    cause = error if isinstance(error, Exception) else None
                    raise ChordError(f'Dependency {part} raised {safe_repr(error)}') from cause
            values = join(results, values)
            policy = {'retry': True, 'retry_policy': self.retry_policy}
            try:
                # The policy is for a connection that breaks, the 20 seconds for one to be made.
                retry_over_time(body.apply_async, OperationalError, [[values]], policy, timeout=20)
            except Exception as error:
                raise ChordError(f'Callback error: {safe_repr(error)}') from error
        except Exception as error:
            logger.error('chord %s: its body fails: %s', chord_id, error)
            self.chord_error_from_stack(body, error)
        try:
            self.delete(self.get_key_for_group(chord_id))
            self.delete(self.get_key_for_chord(chord_id))
        except Exception:  # it would be taken for a failure of the part, which has succeeded
            logger.exception('chord %s: has ended, but is not deleted', chord_id)

    def chord_error_from_stack(self, callback, exc=None):
        """A part has failed, so the body has. Celery tells no chord that the body is a part of."""
        if not callback.id:  # a chain before Celery 5.6; super() stores the error by the id
            callback.options['task_id'] = find_ends(callback)[0].id
        super().chord_error_from_stack(callback, exc)
        self._fail_chain([callback], exc)

    def _fail_chain(self, chain, exc, traceback=None, store_result=True, state=states.FAILURE):
        """A task has failed, so those chained after it have. Celery leaves out those in groups."""
        for signature in chain if isinstance(chain, list) else []:  # an odd message has others
            for task in find_ends(signature):
                request = Context({**task, **task.options}, id=task.id)
                if store_result and task.id:
                    if self._look_at_part(task.id)['status'] not in states.READY_STATES:
                        self.store_result(task.id, exc, state, traceback, request=request)
                    request._celery_s3_state = state  # it keeps the error that it has
                self.on_chord_part_return(request, state, exc)


class S3Backend(S3ChordBackend, S3WaitingBackend, S3StoringBackend):
    """Results, groups and chords in S3: `result_backend = 'celery_s3.S3Backend'`."""
