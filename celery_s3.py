"""Celery results in Amazon S3: one file on botocore, without boto3 and without a server.

    app.conf.result_backend = 'celery_s3.S3Backend'
    app.conf.s3_backend_settings = {'bucket': 'my-results'}

`Bucket` speaks signed S3 over HTTP. `S3KeyValueBackend` is a whole backend on it, with Celery's
own ways of storing results, waiting for them and running chords. Three subclasses improve one of
these ways each, and know nothing of one another. `S3Backend` joins them: to leave one out, write a
class that joins the other two.

There is no botocore client here: to make one takes more time and memory than all of this module,
in each process of a worker, and it adds checksums to each PUT that some stores refuse.

A chord survives the death of a worker only where the broker delivers the dead worker's messages
again: set `task_acks_late`, and `task_reject_on_worker_lost` for the children of a prefork pool.

This module relies on some things that are not public or not documented:
- Celery (seen in 5.4.0, 5.5.3, 5.6.3, 5.7.0): that the methods overridden here are called as their
  docstrings say; `thread_safe`, `supports_...`, `delete_group`, `get_key_for_...` and
  `_get_result_meta` of a backend; `_cache` and `_maybe_set_cache` of a result; that a request
  takes new attributes; that a chord's parts are sent after apply_chord(), with the same `body`.
- kombu (seen in 5.3 to 5.7): `retry_over_time`, with which it connects to a broker.
- botocore (seen in 1.34.41, 1.44.8): `URLLib3Session`, its `socket_options`, its errors' `kwargs`;
  `utils`, `handlers.VALID_BUCKET`, the data file 'partitions', the parser of XML errors.
"""

import json
import logging
import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from socket import IPPROTO_TCP, TCP_NODELAY
from typing import Any, NamedTuple
from urllib.parse import quote

import botocore.exceptions
import botocore.session
from botocore import auth, awsrequest, handlers, httpsession, parsers, utils
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
from celery import canvas, states, uuid
from celery.backends.base import Context, KeyValueStoreBackend
from celery.exceptions import BackendStoreError, ChordError, ImproperlyConfigured
from celery.result import result_from_tuple
from kombu.exceptions import OperationalError
from kombu.utils.encoding import bytes_to_str, ensure_bytes, safe_repr
from kombu.utils.functional import retry_over_time

__version__ = '2.0.0'
logger = logging.getLogger(__name__)
# celery-s3 1.x is configured as 'celery_s3.backends.S3Backend'. This makes that name lead here.
# (A module that was loaded by hand may not be registered.)
if __name__ in sys.modules:
    backends = sys.modules[f'{__name__}.backends'] = sys.modules[__name__]

# Three things are worth another attempt. First, a status: all from 500 on but 501 (which says that
# the store cannot do it), and 408 (the request came too slowly), 409 (others write this key now),
# 429 (too many requests), 499 (MinIO is shutting down).
TRANSIENT_STATUSES = {408, 409, 429, 499}
# Second, a code with one of these words in it: for throttling, as botocore's 'standard' retries
# know it; for a request that was damaged or grew old on its way; and for a web identity whose
# provider AWS STS could not ask.
# https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
TRANSIENT_CODES = re.compile(
    'Throttl|LimitExceeded|TooManyRequests|SlowDown|RequestTimeout|PriorRequestNotComplete'
    '|ProvisionedThroughputExceeded|TransactionInProgress|RequestTimeTooSkewed|BadDigest'
    '|XAmzContentSHA256Mismatch|IDPCommunicationError|InvalidIdentityToken'
)
# Third, an error: no connection could be made (ConnectionError); one broke, or no answer came
# (HTTPClientError has these subclasses); or a source of credentials had none at that moment.
TRANSIENT_ERRORS = (
    botocore.exceptions.ConnectionError,
    HTTPClientError,
    botocore.exceptions.NoCredentialsError,
    botocore.exceptions.CredentialRetrievalError,
    botocore.exceptions.MetadataRetrievalError,
)
# How often a request is sent at most, unless AWS_MAX_ATTEMPTS says it.
ATTEMPTS = 5
# Seconds that the first pause between attempts may last: after an answer, or if no connection can
# be made, as the store is busy or restarts; and after anything else. Each further pause may be
# twice as long, up to LONGEST_PAUSE.
FIRST_PAUSE_BUSY = 1.0
FIRST_PAUSE = 0.2
LONGEST_PAUSE = 20.0

# S3's codes for a condition that is not met. '412' is an answer without a body; NoSuchKey: there
# is no object which could have the etag.
UNMET = {'PreconditionFailed', '412', 'NoSuchKey'}
# Two forms of an etag in If-Match. AWS takes both, Cloudflare R2 only the first (the other is an
# InvalidArgument there), Ceph 16 only the second.
ETAG_FORMS = ['"{}"', '{}']
# How often to try to write a state, each time over what others wrote meanwhile; and seconds that a
# pause may last before the third time and each later one.
STORE_ATTEMPTS = 20
STORE_PAUSE = 0.2

# Seconds between two looks at tasks. Celery passes the first where the user gives no interval: so
# an interval of 0.5 cannot be told from none.
CELERYS_INTERVAL = 0.5
SHORTEST_INTERVAL = 0.5
LONGEST_INTERVAL = 30.0

# Seconds. The last attempt to publish a chord's body begins within this limit; with brokers that
# refuse or never answer, that attempt was seen to end 4.3 seconds later at most. So after the
# grace, a worker that had begun to send a body has sent it, has failed it, or is dead.
SENDING_LIMIT = 20
SENDING_GRACE = SENDING_LIMIT + 10
# Arguments of kombu's retry_over_time(): an attempt each second, then the last error is raised.
RETRIES = {'interval_start': 1, 'interval_step': 0, 'interval_max': 1, 'timeout': SENDING_LIMIT}
# An option of a chord's body, with the chord's id: all parts receive it, and find the note by it.
CHORD_ID = 'celery_s3_chord_id'

# S3 Express has directory buckets, whose names tell the zone that they are in. Others with such an
# end (--SOMETHING-s3) have hosts that this module does not know, and '.' and '..' are no names.
# The rest is botocore's rule: up to 255 letters, digits, '.', '-' and '_'.
# https://docs.aws.amazon.com/AmazonS3/latest/userguide/directory-bucket-naming-rules.html
EXPRESS = r'(?=.{3,63}$)[a-z0-9][a-z0-9-]*--(?P<zone>[a-z0-9]+(-[a-z0-9]+)+)--x-s3'
ORDINARY = rf'(?!.*--\w+-s3$|\.\.?$){handlers.VALID_BUCKET.pattern}'
ENDPOINT = r'https?://(\[[^\]]+\]|[^@:/?#]+)(:\d{1,5})?(/[\w.~/-]*)?'
KEY_SETTINGS = 'aws_access_key_id', 'aws_secret_access_key', 'aws_session_token'
# https://www.rfc-editor.org/rfc/rfc9110#section-5.6.2
HEADER_NAME = "[!#$%&'*+.^_`|~0-9A-Za-z-]+"
# What a setting has to be: a pattern for its text, and the same in words. PRINTABLE is for all
# that are not listed.
PRINTABLE = '([!-~]([ -~]*[!-~])?)?', 'printable ASCII, with no space at its ends'
RULES = {
    'bucket': (f'{EXPRESS}|{ORDINARY}', 'a name or an alias, no URL and no ARN'),
    'base_path': (r'(?!(.*/)?\.\.?(/|$))[^\0-\x1f\x7f]*', "without '.', '..', control characters"),
    'endpoint_url': (f'({ENDPOINT})?', 'http:// or https:// and a host, perhaps port and path'),
    'max_connections': (r'[1-9]\d*', 'a whole number, 1 or more'),
}


# Settings


@dataclass(frozen=True, kw_only=True, repr=False)
class Settings:
    """What a user sets. Error trackers send the variables of functions that fail, by their reprs.
    So this class has no repr, and no function here that may fail has a secret in a variable."""

    bucket: str = ''
    # A folder in the bucket.
    base_path: str = ''
    aws_region: str = ''
    aws_profile: str = ''
    aws_access_key_id: str = ''
    aws_secret_access_key: str = ''
    aws_session_token: str = ''
    endpoint_url: str = ''
    # Sent with each PUT.
    headers: Mapping = field(default_factory=dict)
    # Whether the store can write on a condition. If not, storing and chords are Celery's own ways.
    conditional_writes: bool = True
    # For those without s3:ListBucket, to whom S3 answers 403 where a key is missing.
    denied_is_missing: bool = False
    # The most connections that are kept, and the most threads of Bucket.map_parallel().
    max_connections: int = 50
    # No setting, but the names that from_dict() found and does not know.
    unknown: tuple = ()

    @classmethod
    def from_dict(cls, given: Mapping) -> 'Settings':
        """The settings in a dict, where None and '' mean 'not set'. The dict holds secrets, so
        this must not fail: check() does."""
        known = [setting.name for setting in fields(cls) if setting.name != 'unknown']
        unknown = tuple(name for name in given if name not in known)
        is_set = [name for name in known if given.get(name) not in (None, '')]
        return cls(unknown=unknown, **{name: given[name] for name in is_set})

    def complete(self, session: botocore.session.Session) -> 'Settings':
        """These settings, with region and endpoint from where AWS tools find them (except
        endpoints in profile files)."""
        config = session.get_config_variable
        region = self.aws_region or config('region') or 'us-east-1'
        url = self.endpoint_url
        if not url and not config('ignore_configured_endpoint_urls'):
            url = os.getenv('AWS_ENDPOINT_URL_S3') or os.getenv('AWS_ENDPOINT_URL') or ''
        return replace(self, aws_region=region, endpoint_url=url)

    def check(self) -> None:
        """Raise ValueError where a setting cannot be right: with its name, without its value."""
        if self.unknown:
            known = [setting.name for setting in fields(self) if setting.name != 'unknown']
            raise ValueError(f'unknown setting {self.unknown[0]!r}; known are {", ".join(known)}')
        for setting in fields(self):
            name = setting.name
            # A class, as the types are written above: not a text, and not a union of types.
            kind: Any = setting.type
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f'{name} must be of type {kind.__name__}')  # noqa: TRY004
            pattern, meaning = RULES.get(name, PRINTABLE)
            # True is an int in Python, but 'True' is no number.
            if not re.fullmatch(pattern, str(getattr(self, name)), re.ASCII):
                raise ValueError(f'{name} must be {meaning}')
        if self.endpoint_url and not utils.is_valid_uri(self.endpoint_url):
            raise ValueError('endpoint_url must have the name or address of a host')
        is_region = True
        try:
            # botocore takes the empty name, too. complete() fills it in.
            utils.validate_region_name(self.aws_region)
        except ValueError:
            is_region = False
        if not is_region:
            raise ValueError('aws_region must be a name such as us-east-1')
        if not all(self.is_header(name, self.headers[name]) for name in self.headers):
            raise ValueError('headers must be names and values that HTTP can send')
        if bool(self.aws_access_key_id) != bool(self.aws_secret_access_key):
            raise ValueError('aws_access_key_id and aws_secret_access_key go together')
        if self.aws_session_token and not self.aws_access_key_id:
            raise ValueError('aws_session_token goes with aws_access_key_id and its secret')

    @staticmethod
    def is_printable(text: object) -> bool:
        """Whether this is text that can be sent in a header."""
        return isinstance(text, str) and re.fullmatch(PRINTABLE[0], text) is not None

    @classmethod
    def is_header(cls, name: Any, value: object) -> bool:
        """Whether HTTP can send this header."""
        is_token = cls.is_printable(name) and re.fullmatch(HEADER_NAME, name) is not None
        return is_token and cls.is_printable(value)


# The bucket


class Stored(NamedTuple):
    """An object as it is stored. The etag, here without quotes, changes with its value."""

    value: bytes
    etag: str


class Swap(NamedTuple):
    """The outcome of a conditional write: whether it took place, and what is stored now."""

    won: bool
    stored: Stored | None


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed when it is sent again."""
    if isinstance(error, ClientError):
        code = str(error.response.get('Error', {}).get('Code'))
        status = error.response.get('ResponseMetadata', {}).get('HTTPStatusCode') or 0
        is_failure = status in TRANSIENT_STATUSES or (status >= 500 and status != 501)
        return is_failure or TRANSIENT_CODES.search(code) is not None
    return isinstance(error, TRANSIENT_ERRORS) and 'CERTIFICATE_VERIFY_FAILED' not in str(error)


def choose_pause(error: Exception, attempt: int) -> float:
    """Seconds to wait after this attempt (counted from 1). They are random, so that clients which
    have failed together do not come back together.
    https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/"""
    is_busy = isinstance(error, (ClientError, botocore.exceptions.ConnectionError))
    first = FIRST_PAUSE_BUSY if is_busy else FIRST_PAUSE
    # Ten doublings exceed the longest pause. A thousand would overflow.
    return random.uniform(0, min(first * 2 ** min(attempt - 1, 10), LONGEST_PAUSE))


def open_session(settings: Settings) -> botocore.session.Session:
    """A session of botocore, which finds credentials, profiles and the rest of the environment."""
    session = botocore.session.Session(profile=settings.aws_profile or None)
    problem = ''
    try:
        session.get_scoped_config()
    except BotoCoreError as error:
        problem = str(error)
    if problem:
        # A new error, and not in the 'except' block: the frames of botocore's hold all profiles.
        raise ValueError(f'aws_profile or AWS_PROFILE: {problem}')
    if settings.aws_access_key_id:
        session.set_credentials(*[getattr(settings, name) for name in KEY_SETTINGS])
    return session


def make_root(settings: Settings, session: botocore.session.Session) -> str:
    """The URL to put before a key."""
    bucket, region = settings.bucket, settings.aws_region
    if settings.endpoint_url:
        return f'{settings.endpoint_url.rstrip("/")}/{bucket}/'
    # Partitions of AWS, such as China, have suffixes of their own. The first is the public one.
    partitions = session.get_component('data_loader').load_data('partitions')['partitions']
    matching = (each for each in partitions if re.match(each['regionRegex'], region))
    suffix = next(matching, partitions[0])['outputs']['dnsSuffix']
    fips = '-fips' if session.get_config_variable('use_fips_endpoint') else ''
    dual_stack = '.dualstack' if session.get_config_variable('use_dualstack_endpoint') else ''
    express = re.fullmatch(EXPRESS, bucket)
    service = f's3express{fips}-{express["zone"]}' if express else f's3{fips}'
    host = f'{service}{dual_stack}.{region}.{suffix}'
    # False for names that cannot stand before the host: S3's certificates do not cover those with
    # dots, and old names may have capitals.
    if utils.check_dns_name(bucket):
        return f'https://{bucket}.{host}/'
    return f'https://{host}/{bucket}/'


def strip_error(error: Any) -> BaseException:
    """The same error without the frames and errors attached to it, which hold credentials."""
    if type(error) is HTTPClientError and isinstance(error.kwargs.get('error'), BaseException):
        # This class itself, unlike its subclasses, wraps errors that are not botocore's, such as a
        # soft time limit that strikes during the request, and that the task wants to catch.
        return strip_error(error.kwargs['error'])
    if isinstance(error, (botocore.exceptions.ConnectionError, HTTPClientError)):
        cause: BaseException = error
        while cause.__context__ is not None:
            cause = cause.__context__
        # A copy, as the original keeps the request. Its cause, such as 'Connection refused', is
        # the innermost error, and becomes a part of the text.
        copy = type(error)(**{name: str(error.kwargs[name]) for name in error.kwargs})
        copy.args = (f'{error} ({type(cause).__name__}: {cause})',)
        return copy
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def read_refusal(answer: awsrequest.AWSResponse, status: int) -> dict:
    """What ClientError is made of. Only code and message are taken from the answer, as S3 may
    repeat the request's headers in it, and so the session token."""
    given = {'status_code': status, 'headers': answer.headers, 'body': answer.content}
    # With no particular shape (None), it takes any answer, also a proxy's HTML without a code.
    parsed = parsers.create_parser('rest-xml').parse(given, None)
    error = parsed.get('Error', {})
    texts = {'Code': error.get('Code') or str(status), 'Message': error.get('Message') or ''}
    return {'Error': texts, 'ResponseMetadata': parsed['ResponseMetadata']}


class Bucket:
    """A folder of an S3 bucket, for all threads of one process. Raises ValueError for a wrong
    setting, ClientError for what S3 refuses, botocore's other errors where S3 is out of reach, and
    what the handler of a signal raises."""

    def __init__(self, settings: Settings):
        settings.check()
        self._session = open_session(settings)
        self.settings = settings.complete(self._session)
        # What the environment says of region and endpoint may be wrong, too.
        self.settings.check()
        config = self._session.get_config_variable
        # The region of AWS STS, if a role is to be assumed.
        self._session.set_config_variable('region', self.settings.aws_region)
        self._events = self._session.get_component('event_emitter')
        folder = self.settings.base_path.strip('/')
        self._prefix = f'{folder}/' if folder else ''
        self.uri = f's3://{self.settings.bucket}/{self._prefix}'
        self._root = make_root(self.settings, self._session)
        # S3 Express takes plain signatures for this service. (boto3 opens a session first, unless
        # AWS_S3_DISABLE_EXPRESS_SESSION_AUTH is set.)
        self._service = 's3express' if utils.is_s3express_bucket(settings.bucket) else 's3'
        self._attempts = config('max_attempts') or ATTEMPTS
        # Both forms, until one has been taken.
        self._etag_forms = ETAG_FORMS
        # Its time-outs are botocore's: 60 seconds to connect, and 60 for the next byte to come.
        self._http = httpsession.URLLib3Session(
            verify=config('ca_bundle') or os.getenv('REQUESTS_CA_BUNDLE') or True,
            proxies=utils.get_environ_proxies(self._root),
            max_pool_connections=self.settings.max_connections,
            # Nagle's algorithm would hold back the end of each PUT for 40 ms.
            socket_options=[(IPPROTO_TCP, TCP_NODELAY, 1)],
        )
        # Two threads must not look up credentials in one session at once. (Once found, they lock
        # their own renewal.)
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(self.settings.max_connections)

    def get(self, key: str) -> Stored | None:
        """The object of this key, if there is one."""
        denied = ['AccessDenied'] if self.settings.denied_is_missing else []
        return self._send('GET', key, {'NoSuchKey', *denied})

    def put(self, key: str, value: bytes) -> None:
        """Write the object, whatever was there."""
        self._send('PUT', key, set(), data=value, headers=self.settings.headers)

    def put_if(self, key: str, value: bytes, etag: str | None) -> Swap:
        """Write the object if it has this etag or, where the etag is None, if there is no object.

        It costs a PUT, a second one until it is known in which form the store takes etags, and a
        GET if it was refused. Two who write the same value may both win.
        https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html"""
        unmet, header, forms = UNMET, 'If-Match', self._etag_forms
        if etag is None:
            header, forms = 'If-None-Match', ['*']
        for form in forms:
            stored = self._put_on(key, value, {header: form.format(etag)}, unmet)
            if stored is None:
                # What R2 says of the second form is a refusal; of the first one, it is an error.
                unmet = {*UNMET, 'InvalidArgument'}
                continue
            if not stored.etag:
                problem = 'the store or a proxy sends no ETag: set conditional_writes to False'
                raise botocore.exceptions.InvalidConfigError(error_msg=problem)
            if etag is not None:
                self._etag_forms = [form]
            return Swap(True, Stored(value, stored.etag))
        # If the answer to a write is lost, it is sent again, and refused because of itself.
        found = self.get(key)
        return Swap(found is not None and found.value == value, found)

    def delete(self, key: str) -> None:
        """Delete the object, if there is one."""
        self._send('DELETE', key, {'NoSuchKey'})

    def ignores_conditions(self, key: str) -> bool:
        """Whether the store ignores an If-Match that is not met. If so, this object is emptied."""
        impossible = {'If-Match': '"00000000000000000000000000000000"'}
        return self._put_on(key, b'', impossible, UNMET) is not None

    def map_parallel(self, function: Callable, items: list) -> Iterator[tuple]:
        """Yield (item, function(item)) in order. Many run at once, in threads that all callers
        share. An error is raised in its turn; then the rest is left alone, and not waited for. The
        function should only read: if no more threads can be started, some items get it twice."""
        values: Iterable = map(function, items)
        if len(items) > 1:
            # If no thread can be started: one after the other.
            with suppress(RuntimeError):
                values = self._threads.map(function, items)
        yield from zip(items, values)

    def _put_on(self, key: str, value: bytes, condition: dict, unmet: set) -> Stored | None:
        """Write the object on a condition. None if it is not met."""
        headers = {**self.settings.headers, **condition}
        return self._send('PUT', key, unmet, data=value, headers=headers)

    def _send(self, method: str, key: str, refusals: set, **content: Any) -> Stored | None:
        """Send a request until the answer is final: what it says is stored, or None if its code is
        among the refusals. The content is `data` and `headers`, as of AWSRequest."""
        # The path is signed as it is quoted here. UTF-8 has no bytes for half of a surrogate pair,
        # which an id may contain.
        path = quote(self._prefix + key, safe='/-._~', errors='backslashreplace')
        attempt = 1
        while True:
            try:
                # A new request each time, as its date and its credentials grow old.
                request = awsrequest.AWSRequest(method, self._root + path, **content)
                return self._read(method, key, self._exchange(request), refusals)
            except (ClientError, *TRANSIENT_ERRORS) as error:
                if attempt >= self._attempts or not is_transient(error):
                    raise
                pause = choose_pause(error, attempt)
                attempt += 1
                logger.warning('%s; attempt %d in %.1f s', error, attempt, pause)
                time.sleep(pause)

    def _read(self, method: str, key: str, answer: Any, refusals: set) -> Stored | None:
        """What the answer says is stored, or None if it is a refusal. Raises its error, if any."""
        # The content is in no variable, as S3 may repeat a session token in it.
        status, headers = answer.status_code, answer.headers
        # urllib3 does not notice here that a connection broke before a body's end. A proxy may
        # repeat the length, as in '5, 5': https://www.rfc-editor.org/rfc/rfc9110#section-8.6
        length = headers.get('content-length', '').partition(',')[0]
        if length.isdigit() and int(length) != len(answer.content):
            raise botocore.exceptions.ConnectionClosedError(
                endpoint_url=f'{answer.url} (cut short)'
            )
        if method == 'PUT' and status == 200 and b'<Error' in answer.content:
            # S3 may fail after it has begun to answer that all is well.
            status = 500
        if status < 300:
            # Some proxies put W/ before an etag.
            return Stored(answer.content, headers.get('etag', '').removeprefix('W/').strip('"'))
        refusal = read_refusal(answer, status)
        if refusal['Error']['Code'] in refusals:
            return None
        details = f'HTTP {status}, region {self.settings.aws_region}'
        for name in 'x-amz-bucket-region', 'x-amz-request-id':
            if name in headers:
                details += f', {name} {headers[name]}'
        raise ClientError(refusal, f'{method} {self.uri}{key} ({details})')

    def _exchange(self, request: awsrequest.AWSRequest) -> awsrequest.AWSResponse:
        """Sign and send. What it raises has no frames below this one, as they hold credentials."""
        try:
            return self._sign_and_send(request)
        except BaseException as error:  # noqa: BLE001
            failure = strip_error(error)
        # Not in the 'except' block: there, Python would hang the original error on this one.
        raise failure

    def _sign_and_send(self, request: awsrequest.AWSRequest) -> awsrequest.AWSResponse:
        """The only method that has credentials in its variables."""
        try:
            with self._lock:
                credentials = self._session.get_credentials()
            frozen = credentials and credentials.get_frozen_credentials()
        except (RuntimeError, ValueError, AttributeError) as error:
            # New credentials of a role that have expired already, or odd words of a process that
            # should tell credentials: a ValueError would keep these in its attributes.
            reason = str(error) if isinstance(error, RuntimeError) else type(error).__name__
            problem = {'provider': 'role or process', 'error_msg': reason}
            raise botocore.exceptions.CredentialRetrievalError(**problem) from None
        if frozen is None:
            raise botocore.exceptions.NoCredentialsError
        if not all(Settings.is_printable(text or '') for text in frozen):
            raise botocore.exceptions.InvalidConfigError(error_msg='credentials must be printable')
        auth.S3SigV4Auth(frozen, self._service, self.settings.aws_region).add_auth(request)
        prepared = request.prepare()
        # Those who listen to botocore's events may answer in place of S3, as moto's mock_aws does.
        name = f'before-send.s3.{request.method.title()}Object'
        _, answer = self._events.emit_until_response(name, request=prepared)
        return answer or self._http.send(prepared)


class S3KeyValueBackend(KeyValueStoreBackend):
    """A whole backend. Celery's own ways of storing, waiting and running chords are made of get(),
    set(), delete() and mget(), which it calls with keys such as 'celery-task-meta-ID'."""

    # Celery may compress what it encodes, as get() returns the very bytes that set() was given.
    supports_result_compression = True
    # Celery beat need not schedule a daily clean-up: a lifecycle rule of the bucket does that.
    supports_autoexpire = True
    # Celery asks this about an error, and then calls again without end, if the user has set
    # result_backend_always_retry.
    exception_safe_to_retry = staticmethod(is_transient)

    def __init__(self, app, *args, **kwargs):
        super().__init__(app, *args, **kwargs)
        # Otherwise Celery makes a backend for each thread. (super().__init__() sets it to False.)
        self.thread_safe = True
        # `key` is how Celery's configuration has it, `name` how the user has written it. The name
        # in capitals is that of old-style settings, and of 1.x.
        name = key = 's3_backend_settings'
        if 'CELERY_S3_BACKEND_SETTINGS' in app.conf:
            name = key = 'CELERY_S3_BACKEND_SETTINGS'
        elif app.namespace:
            # In Django's settings, for example: Celery takes the prefix off.
            name = f'{app.namespace}_S3_BACKEND_SETTINGS'
        if not isinstance(app.conf.get(key, {}), Mapping):
            raise ImproperlyConfigured(f'{name} must be a dict')
        self._settings = Settings.from_dict(app.conf.get(key, {}))
        try:
            self._buckets = {os.getpid(): Bucket(self._settings)}
            return
        except (ValueError, BotoCoreError) as error:
            problem = str(error)
        # Not in the 'except' block, as in Bucket._exchange().
        raise ImproperlyConfigured(f'{name}: {problem}')

    @property
    def bucket(self) -> Bucket:
        """The bucket of this process, as neither connections nor locks may cross a fork."""
        if os.getpid() not in self._buckets:
            self._buckets.setdefault(os.getpid(), Bucket(self._settings))
        return self._buckets[os.getpid()]

    def get(self, key):
        """Returns bytes, or None where there is no such key."""
        stored = self.bucket.get(self.key_t(key))
        return None if stored is None else stored.value

    def set(self, key, value):
        """Takes bytes or text."""
        self.bucket.put(self.key_t(key), ensure_bytes(value))

    def delete(self, key):
        """Does nothing if there is no such key."""
        self.bucket.delete(self.key_t(key))

    def mget(self, keys):
        """Returns a list of what get() returns for each key."""
        return [value for _, value in self.bucket.map_parallel(self.get, list(keys))]

    def as_uri(self, include_password=False):
        """Celery calls this for a worker's banner, and when it reports the configuration."""
        return self.bucket.uri

    @staticmethod
    def key_t(key):
        """Celery calls this for each part of a key, and joins the texts that it returns. An id may
        be bytes, a UUID or, in an odd message, anything."""
        return bytes_to_str(key) if isinstance(key, bytes) else str(key)


# For waiting and for chords


def is_ready(meta: dict) -> bool:
    """Whether a task has ended. Its meta is what is stored of it: state, result and more."""
    return meta['status'] in states.READY_STATES


def list_tasks(results: list) -> list:
    """The results of single tasks, also those in groups and in groups within groups, in order."""
    tasks = []
    for result in results:
        if hasattr(result, 'results'):
            tasks += list_tasks(result.results)
        else:
            tasks.append(result)
    return tasks


def look_until_not_ready(bucket: Bucket, look: Callable, ids: list, size: int) -> Iterator[tuple]:
    """Look at `size` tasks at once, then at three times as many and so on, until one of those that
    were looked at is not ready. Yields the id and the meta of each that was looked at."""
    are_ready = True
    while ids and are_ready:
        for task_id, meta in bucket.map_parallel(look, ids[:size]):
            are_ready = are_ready and is_ready(meta)
            yield task_id, meta
        ids = ids[size:]
        size *= 3


# Storing


class S3StoringBackend(S3KeyValueBackend):
    """Stores a state by one PUT, which cannot replace a SUCCESS. Celery's own way reads before it
    writes, and replaces a SUCCESS that was stored in between."""

    def _store_result(self, task_id, result, state, traceback=None, request=None, **kwargs):
        """Celery calls this in store_result(), with an encodable result, which it must return.
        This one makes one write, which takes place only if nothing was stored since the last write
        of the same request."""
        if not self.bucket.settings.conditional_writes:
            return super()._store_result(task_id, result, state, traceback, request, **kwargs)
        key = self.get_key_for_task(task_id)
        meta = self._get_result_meta(result, state, traceback, request)
        value = ensure_bytes(self.encode({**meta, 'task_id': self.key_t(task_id)}))
        # A task may store states of other tasks as well: update_state(task_id=...).
        is_own = getattr(request, 'id', None) == task_id
        etag = getattr(request, '_celery_s3_etag', None) if is_own else None
        for attempt in range(STORE_ATTEMPTS):
            if attempt > 1:
                time.sleep(random.uniform(0, STORE_PAUSE))
            won, stored = self.bucket.put_if(key, value, etag)
            if won:
                if is_own:
                    # The etag of a SUCCESS is forgotten, so that no state can be written on it.
                    request._celery_s3_etag = None if state == states.SUCCESS else stored.etag
                return result
            etag = None
            if stored is not None:
                etag = stored.etag
                found = self.decode(stored.value)['status']
                # If a task is revoked, each worker stores that. One is enough.
                if found == states.SUCCESS or found == state == states.REVOKED:
                    return result
            # A state that is not final may be dropped when it has lost twice, as others could have
            # written over it at once: many tasks may report progress as the state of one parent.
            if attempt > 0 and state not in states.READY_STATES:
                return result
        problem = 'others store states of this task all the time, or s3:GetObject is not allowed'
        raise BackendStoreError(problem, state=state, task_id=task_id)


# Waiting


class S3WaitingBackend(S3KeyValueBackend):
    """Asks less often the longer a task takes, and for many at once. Celery's own way does not."""

    # A group's get() calls join_native(), and that iter_native().
    supports_native_join = True

    def wait_for(self, task_id, timeout=None, interval=0.5, no_ack=True, on_interval=None):
        """Celery calls this for the get() of a task's result; it must return the meta as soon as
        the task is ready, or raise TimeoutError. This one waits as for a set of one."""
        return next(self.get_many([task_id], timeout, interval, no_ack, None, on_interval))[1]

    def get_many(
        self,
        task_ids,
        timeout=None,
        interval=0.5,
        no_ack=True,
        on_message=None,
        on_interval=None,
        max_iterations=None,
        READY_STATES=states.READY_STATES,
    ):
        """Celery calls this for sets of results; it must yield the id and the meta of each task as
        soon as that is ready, or raise TimeoutError after so many seconds. Each round of this one
        looks at two tasks per second of the next pause, and at more while all are ready. So to
        wait for a large group costs hardly more than for a small one."""
        waiting = dict.fromkeys(bytes_to_str(task_id) for task_id in task_ids)
        last_ready = time.monotonic()
        deadline = float('inf') if timeout is None else last_ready + timeout
        rounds = 0
        while waiting:
            pause = interval
            if interval in (None, CELERYS_INTERVAL):
                idle = time.monotonic() - last_ready
                pause = min(max(SHORTEST_INTERVAL, idle / 10), LONGEST_INTERVAL)
            ids = list(waiting)
            size = max(1, int(2 * pause))
            # When time is up, all are looked at once more, so that none that is ready is missed.
            # And Celery passes max_iterations=1 to see how each task is.
            if max_iterations or time.monotonic() >= deadline:
                size = len(ids)
            for task_id, meta in look_until_not_ready(self.bucket, self.get_task_meta, ids, size):
                del waiting[task_id]
                if meta['status'] not in READY_STATES:
                    # To the end of the line, where it does not keep back those behind it.
                    waiting[task_id] = None
                    continue
                if on_message is not None:
                    on_message(meta)
                yield task_id, meta
                # Read only now: the time that the caller has just taken does not count.
                last_ready = time.monotonic()
            if not waiting:
                return
            if size >= len(ids) and time.monotonic() >= deadline:
                raise self.TimeoutError(f'The operation timed out ({timeout})')
            time.sleep(max(0, min(pause, deadline - time.monotonic())))
            if on_interval is not None:
                # For get(), this raises the error of a failed parent.
                on_interval()
            rounds += 1
            if rounds == max_iterations:
                return

    def iter_native(
        self, result, timeout=None, interval=0.5, no_ack=True, on_message=None, on_interval=None
    ):
        """Celery calls this for a group's get(); it must yield the id and the meta of each task,
        and the id and the results of each group in it. On those Celery then calls get(), one by
        one, without a time-out. So this one first waits for their tasks, and gives them their
        metas: the time-out holds for all, and nobody is asked twice."""
        ids = {each.id for each in result.results}
        if len(ids) < len(result.results):
            # Celery keeps one place for each id, and leaves None for the repeats.
            raise ValueError('an id stands twice in this set: use join() in place of get()')
        tasks = {task.id: task for task in list_tasks(result.results)}
        # A result keeps the meta of a task that it has once seen to be ready.
        for task_id, task in tasks.items():
            if task._cache and task_id in ids:
                yield task_id, task._cache
        unknown = [task_id for task_id, task in tasks.items() if not task._cache]
        found = self.get_many(unknown, timeout, interval, no_ack, on_message, on_interval)
        for task_id, meta in found:
            tasks[task_id]._maybe_set_cache(meta)
            if task_id in ids:
                yield task_id, meta
        for each in result.results:
            if hasattr(each, 'results'):
                yield each.id, each.results


# Chords

OPEN, WAITING, SENDING = 'open', 'waiting', 'sending'


class Note(NamedTuple):
    """Says whose turn it is to go on with a chord: an object with a line of JSON. MINE is the part
    that has written it, OTHER one that MINE has found not ready.

    phase    by                     turn   the chord goes on
    open     nobody                 LAST   when LAST has ended, the last task of the header. Tasks
                                           mostly end in order: the others then cost one GET each
    waiting  MINE, which has ended  OTHER  when OTHER has ended; or when MINE is delivered again,
                                           as its worker has died
    sending  MINE, which has ended  -      now: MINE has found all parts ready, and sends the body

    `body` is the id of the body's result, `record` the id of the chord's record. The nonce makes
    each note unlike all others. So an etag stands for one version of the note, and no other. In
    'sending', `shown` is the etag of a state that the body's id had before: that of a task which
    has replaced itself by the chord. It is no sign that the body has begun."""

    phase: str
    by: str | None
    turn: str | None
    body: str
    record: str
    nonce: str
    shown: str | None = None

    @classmethod
    def decode(cls, value: bytes) -> 'Note':
        """Unknown fields are ignored. A note of an older edition is nobody's turn, so its chord
        never goes on: let all chords end before this file is replaced."""
        known = json.loads(value)
        return cls(*[known.get(name) for name in cls._fields])

    def encode(self) -> bytes:
        """A line of JSON."""
        return json.dumps(self._asdict()).encode()


def claim(parts: Iterable[str], look: Callable, swap: Callable) -> dict | None:
    """Decide whether MINE, the part that calls this, ends the chord. MINE has ended, and has read
    in the note that it may go on. Returns the metas of all parts if MINE ends the chord, and None
    if another part will.

    look(ids) yields the id and the meta of these parts in order, until some are not ready.
    swap(phase, turn) writes the note, unless others have written it since MINE has read or written
    it last, and tells whether it did.

    Somebody always goes on. If MINE finds OTHER not ready, it swaps the note to OTHER's turn, and
    then looks at OTHER once more. OTHER stores its result, and then reads the note. So each writes
    before it reads, and in S3 a read sees all writes that ended before it began: MINE sees OTHER's
    result, or OTHER sees that it is its turn. If both do, both go on, until both swap the same
    version of the note: one of them wins, and the other one leaves."""
    metas: dict[str, dict] = {}
    rest = list(dict.fromkeys(parts))
    while True:
        # Otherwise each part that goes on would begin with the same ready ones.
        random.shuffle(rest)
        looked = dict(look(rest))
        metas.update(looked)
        other = next((part for part in looked if not is_ready(looked[part])), None)
        if other is None:
            return metas if swap(SENDING, None) else None
        if not swap(WAITING, other):
            return None
        metas.update(look([other]))
        if not is_ready(metas[other]):
            return None
        # OTHER may have read the note before it said its turn, and left. So MINE goes on.
        rest = [part for part in rest if part not in metas or not is_ready(metas[part])]


def find_last(signature) -> canvas.Signature:
    """The task or group whose result is the result of this task, group, chain or chord."""
    # In a message, a signature is a dict.
    signature = canvas.maybe_signature(signature)
    if signature.subtask_type == 'chain':
        return find_last(signature.tasks[-1])
    if signature.subtask_type == 'chord':
        return find_last(signature.body)
    return signature


def find_ends(signature) -> list:
    """The tasks whose results make the result of this task, group, chain or chord."""
    last = find_last(signature)
    if last.subtask_type != 'group':
        return [last]
    return [end for task in last.tasks for end in find_ends(task)]


def nest_values(results: list, metas: dict) -> list:
    """The values of these results, in lists within lists where groups are within groups."""
    return [
        nest_values(each.results, metas)
        if hasattr(each, 'results')
        else metas[str(each.id)]['result']
        for each in results
    ]


class S3ChordBackend(S3KeyValueBackend):
    """Runs chords without polling. The tasks of a chord's header are its parts; when they have
    ended, its body is sent with their results. (Celery's own way is a task that looks at all parts
    every second.) Each chord has two objects: the record keeps the ids of the parts' results, in
    groups where the header has groups; the note says whose turn it is, see `Note`.

    A chord of the parts 1, 2, 3 and the body B. Its header has the id H; N1 to N4 are nonces:

    client  writes the record H.3.N1, and then the note H.3:
            {"phase": "open", "by": null, "turn": "3", "body": "B", "record": "H.3.N1",
             "nonce": "N2"}; then it publishes the parts
    part 1  ends, stores its result, reads the note, and leaves: it is not its turn
    part 3  ends, stores its result, reads the note, then the record, and finds part 2 not ready;
            writes {"phase": "waiting", "by": "3", "turn": "2", ... "nonce": "N3"},
            looks at part 2 once more, which is not ready yet, and leaves
    part 2  ends, stores its result, reads the note, then the record, and finds all parts ready;
            writes {"phase": "sending", "by": "2", "turn": null, ... "nonce": "N4"},
            sends B with the three results, deletes the record, and then the note

    Four bad days:
    - A worker dies in 'waiting'. If part 2 ran there, it is delivered again, and has its turn. If
      it was part 3, it is delivered again, finds itself in `by`, and looks again: see _go_on().
    - The worker of part 2 dies in 'sending'. Part 2 is delivered again, and finds out whether the
      body was sent. If so, it does what is left, else it sends it: _is_sent() and _finish().
    - The chord is started twice. A task's message may hold the chord that follows, with all its
      ids: if the message is delivered twice, so may be the chord's start. See apply_chord().
    - S3 fails in on_chord_part_return() for longer than all attempts take. Celery logs the error,
      and the chord stays where the note says, unless the broker delivers the part again.

    The body is sent once, unless its worker dies after that (or takes longer than SENDING_GRACE),
    and the body has no state when its part is delivered again; or the broker goes away in the
    middle of a body that is a group; or the chord is started again after it has ended."""

    # Whether the store was seen to honour conditions.
    _is_trusted = False

    def apply_chord(self, header_result_args, body, **kwargs):
        """Celery calls this before it publishes a header, with what its GroupResult is made of and
        with the very body that each part receives as request.chord; it returns nothing. This one
        writes the record and the note."""
        if not self.bucket.settings.conditional_writes:
            super().apply_chord(header_result_args, body, **kwargs)
            return
        header = self.app.GroupResult(*header_result_args)
        last = str(list_tasks(header.results)[-1].id)
        # Several chords may have the same header's id, if a signature is used twice.
        chord_id = f'{header.id}.{last}'
        body.options[CHORD_ID] = chord_id
        # Each start has a record of its own, and writes it before its note. So if a note has no
        # record, its chord is over. (On a condition, as the policies of some buckets demand it.)
        record = f'{chord_id}.{uuid()}'
        key = self.get_key_for_group(record)
        value = ensure_bytes(self.encode({'result': header.as_tuple()}))
        self.bucket.put_if(key, value, None)
        self._require_conditions(key)
        note = Note(OPEN, None, last, str(find_last(body).id), record, uuid())
        _, stored = self.bucket.put_if(self.get_key_for_chord(chord_id), note.encode(), None)
        logger.debug('chord %s: begun, %s goes on', chord_id, last)
        # If another start has won, this record is of no use. (Compare records, not notes: if the
        # answer to this write was lost, parts that the other start has sent may have gone on.)
        if stored is None or Note.decode(stored.value).record != record:
            self.delete_group(record)

    def _require_conditions(self, key: str) -> None:
        """Refuse a store that ignores conditions, and so would let two parts send the body each.
        This costs a PUT to this object before the first chord."""
        if not self._is_trusted and self.bucket.ignores_conditions(key):
            self.delete(key)
            problem = 'this store ignores If-Match, so that a chord could run its body twice'
            remedy = 'set conditional_writes to False, for clients and workers alike'
            raise ImproperlyConfigured(f'{problem}: {remedy}')
        self._is_trusted = True

    def store_result(self, task_id, result, state, traceback=None, request=None, **kwargs):
        """Celery calls this for each state of a task; it must return the encoded result. This one
        keeps on the request which state was stored, for on_chord_part_return()."""
        encoded = super().store_result(task_id, result, state, traceback, request, **kwargs)
        if getattr(request, 'id', None) == task_id:
            request._celery_s3_state = state
        return encoded

    def on_chord_part_return(self, request, state, result, **kwargs):
        """Celery calls this when a task has ended that may be part of a chord; the result is
        stored by then, unless the task ignores it. What it returns is ignored. This one stores the
        result in any case, as the body needs it, and goes on with the chord. _fail_ends() calls it
        as well, and uses what it returns: see _go_on()."""
        # An odd message may have no id, or anything as its chord.
        if not isinstance(request.chord, dict) or not request.id:
            return False
        if getattr(request, '_celery_s3_state', None) != state:
            self.store_result(request.id, result, state, request=request)
        options = request.chord.get('options')
        if not isinstance(options, dict) or not options.get(CHORD_ID):
            # This chord polls.
            return False
        return self._go_on(str(request.id), options[CHORD_ID], request.chord)

    def _go_on(self, part: str, chord_id: str, message: dict) -> bool:
        """Read the note, now that this part has ended, and do what it says. The message holds the
        body. Returns whether another delivery of this part was faster, and goes on with it."""
        key = self.get_key_for_chord(chord_id)
        stored = self.bucket.get(key)
        if stored is None:
            # The chord is over.
            return False
        note, etag = Note.decode(stored.value), stored.etag
        if part not in (note.by, note.turn):
            logger.debug('chord %s: %s leaves it to %s', chord_id, part, note.turn or note.by)
            return False
        # A copy without our option, which is not to be sent.
        body = canvas.maybe_signature(message, app=self.app).clone()
        del body.options[CHORD_ID]
        record = self.get(self.get_key_for_group(note.record))
        # In 'sending', an earlier delivery of this part has begun to send the body. Without a
        # record, the chord is over: another delivery was faster, or a start whose answer was lost
        # has written its note once more. Or a lifecycle rule has deleted the record.
        if note.phase == SENDING or record is None:
            if not self._is_sent(note):
                logger.info('chord %s: %s waits %d s', chord_id, part, SENDING_GRACE)
                time.sleep(SENDING_GRACE)
            if self._is_sent(note):
                self._finish(chord_id, note, body)
                return False
            # The worker of the earlier delivery has died, and this one sends the body; or the
            # record is lost, and the body fails, if the note is still there.

        winner = None

        def look(ids: list) -> Iterator[tuple]:
            return look_until_not_ready(self.bucket, self._look_at_task, ids, 1)

        def swap(phase: str, turn: str | None) -> bool:
            nonlocal etag, winner
            shown = self._find_unready(note.body) if phase == SENDING else None
            changed = note._replace(phase=phase, by=part, turn=turn, nonce=uuid(), shown=shown)
            won, now = self.bucket.put_if(key, changed.encode(), etag)
            logger.debug('chord %s: %s writes %s, %s: %s', chord_id, part, phase, turn, won)
            if won and now is not None:
                etag = now.etag
            elif now is not None:
                winner = Note.decode(now.value).by
            return won

        try:
            results = self._decode_record(note.record, record)
        except ChordError as error:
            # No part can be looked at. The body fails.
            if swap(SENDING, None):
                logger.exception('chord %s: its body fails', chord_id)
                self.chord_error_from_stack(body, error)
                self._delete(chord_id, note)
        else:
            metas = claim([str(task.id) for task in list_tasks(results)], look, swap)
            if metas is not None:
                self._end(chord_id, note, body, results, metas)
        return winner == part

    def _end(
        self, chord_id: str, note: Note, body: canvas.Signature, results: list, metas: dict
    ) -> None:
        """Send the body or, if that cannot be, fail it."""
        try:
            self._send_body(body, results, metas)
        except Exception as error:
            logger.exception('chord %s: its body fails', chord_id)
            # In this 'except' block, as Celery stores the traceback of the error, too.
            self.chord_error_from_stack(body, error)
        self._delete(chord_id, note)

    def _is_sent(self, note: Note) -> bool:
        """Whether the body is known to be sent or failed. After that, the record is deleted; and
        the body may show a new state, unless it is a group, which has none under its id."""
        if note.phase == SENDING and self.get(self.get_key_for_group(note.record)) is None:
            return True
        state = self.bucket.get(self.get_key_for_task(note.body))
        return state is not None and state.etag != note.shown

    def _find_unready(self, task_id: str) -> str | None:
        """The etag of the task's state, if there is one that is not final."""
        stored = self.bucket.get(self.get_key_for_task(task_id))
        if stored is None or is_ready(self._decode_meta(stored.value)):
            return None
        return stored.etag

    def _finish(self, chord_id: str, note: Note, body: canvas.Signature) -> None:
        """Do what comes after the body was sent or has failed. It does no harm to do it twice."""
        meta = self._look_at_task(note.body)
        if meta['status'] in states.PROPAGATE_STATES:
            # The worker may have died before it told the outer chord, if this body is part of one.
            self._fail_ends([body], meta['result'])
        self._delete(chord_id, note)

    def _delete(self, chord_id: str, note: Note) -> None:
        """Delete the record and then the note: _is_sent() relies on this order."""
        try:
            self.delete_group(note.record)
            self.delete(self.get_key_for_chord(chord_id))
        except Exception:
            # All is done but for two objects that stay, so nobody need be troubled.
            logger.exception('chord %s: has ended, but is not deleted', chord_id)

    def _decode_record(self, record: str, value: bytes | None) -> list:
        """The results of the header. Raises ChordError, with Celery's messages."""
        if value is None:
            raise ChordError(f'GroupResult {record} no longer exists')
        try:
            return result_from_tuple(self.decode(value)['result'], self.app).results
        except Exception as error:
            raise ChordError(f'Cannot restore group: {error!r}') from error

    def _look_at_task(self, task_id: str) -> dict:
        """The meta of a task, which is not taken from Celery's cache."""
        return self._decode_meta(self.get(self.get_key_for_task(task_id)))

    def _decode_meta(self, value: bytes | None) -> dict:
        """What is stored of a task. If that cannot be decoded, it counts as the task's failure."""
        if not value:
            return {'status': states.PENDING, 'result': None}
        try:
            return self.decode_result(value)
        except Exception as error:  # noqa: BLE001
            return {'status': states.FAILURE, 'result': error}

    def _send_body(self, body: canvas.Signature, results: list, metas: dict) -> None:
        """Publish the body with the values of these results. Raises ChordError if a part has
        failed, or if the body cannot be sent."""
        for task in list_tasks(results):
            meta = metas[str(task.id)]
            if meta['status'] in states.PROPAGATE_STATES:
                error = meta['result']
                # As in Celery: no cause that is not an Exception, such as CancelledError.
                cause = error if isinstance(error, Exception) else None
                raise ChordError(f'Dependency {task.id} raised {safe_repr(error)}') from cause
        values = nest_values(results, metas)
        try:
            # With retry=True, Celery itself connects again if a connection breaks, and goes on
            # where it was. retry_over_time() is for longer than that, and for a first connection.
            retry_over_time(
                body.apply_async, OperationalError, [[values]], {'retry': True}, **RETRIES
            )
        except Exception as error:
            raise ChordError(f'Callback error: {safe_repr(error)}') from error

    # What follows a failure. A task fails: the tasks that are chained after it cannot run, so they
    # are stored as failed. A part fails: the body cannot run, so it is stored as failed, and if it
    # is a group or a chain, so are the tasks which give its result. A task that has an error of
    # its own keeps it. If a task that is failed like this is a part of a chord, that chord goes
    # on as if the task had run, and its body fails in the same way. This comes to an end, as each
    # step leads to a chord further out. If a task stores no results, only parts of chords are
    # stored of those chained after it.

    def chord_error_from_stack(self, callback, exc=None):
        """Celery calls this for chords that poll, and _go_on() for ours; it calls the errbacks of
        the body, and then stores the error under its id. This one then fails the tasks within the
        body, and tells the outer chord, of which the body may be a part."""
        if not callback.id:
            # Before Celery 5.6, a body that is a chain has no id of its own.
            callback.options['task_id'] = find_last(callback).id
        super().chord_error_from_stack(callback, exc)
        self._fail_ends([callback], exc)

    def _fail_chain(self, chain, exc, traceback=None, store_result=True, state=states.FAILURE):
        """Celery calls this when a task has failed, for those that are chained after it, from 5.7
        on; it returns nothing. This one includes those in groups. (Celery before 5.7 does the same
        elsewhere, but not for those in groups, so that these stay pending.)"""
        # An odd message may have anything as its chain.
        if isinstance(chain, list):
            self._fail_ends(chain, exc, traceback, store_result, state)

    def _fail_ends(self, signatures, error, traceback=None, stores=True, state=states.FAILURE):
        """Fail the tasks which give the results of these signatures."""
        for task in [end for signature in signatures for end in find_ends(signature)]:
            # Celery does the same for a task that never ran, and so has no request.
            request = Context({**task, **task.options}, id=task.id)
            if stores and task.id:
                if not is_ready(self._look_at_task(task.id)):
                    self.store_result(task.id, error, state, traceback, request=request)
                # So on_chord_part_return() does not store it over an error that was there.
                request._celery_s3_state = state
            # Who fails this task, too, at this moment, may die. A task that has run would be
            # delivered again then, but not this one: so this delivery stays until it is done.
            for _ in range(STORE_ATTEMPTS):
                if not self.on_chord_part_return(request, state, error):
                    break


class S3Backend(S3ChordBackend, S3WaitingBackend, S3StoringBackend):
    """Results, groups and chords in S3: `result_backend = 'celery_s3.S3Backend'`."""
