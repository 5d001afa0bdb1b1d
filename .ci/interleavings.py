"""Prove the chords of celery_s3: run every interleaving of its own code, on a store in memory.

    python .ci/interleavings.py [--seconds N]

Run it in the root of a checkout; N is 300 unless told. Each delivery of a message is a thread that
stops before each step. A depth-first search decides who goes next, and begins again until every
order has been run; of orders that differ in steps that commute (on different keys, or both reads),
it ends one ('sleep sets'). Where a scenario says so, the answer to a write is lost after it took
effect, or a worker dies and its message comes again, at each place in turn. A sleep outlasts what
the others do. In the end the body was sent once with the right values, or has the right error, and
nothing but results is left (records may be, after a death or a second start).

There is a line for each search. A schedule that ends wrong is printed, and the exit is 1: each
line is what one delivery did, in this order; the last lines say what is wrong.
"""

import argparse
import json
import logging
import os
import sys
import threading
import time
from collections import namedtuple
from copy import copy
from functools import partial
from hashlib import md5
from types import SimpleNamespace

from botocore.exceptions import ConnectionClosedError
from celery import Celery, chord
from celery.app.task import Context
from kombu.utils.functional import LRUCache

sys.path.insert(0, os.getcwd())
import celery_s3

# A letter is a part, as often as it is delivered. The fate befalls one step.
FIELDS = 'name parts fate failing starts is_silent'
Scenario = namedtuple('Scenario', FIELDS, defaults=('', '', 1, False))
SCENARIOS = [
    Scenario('one part, its chord started twice', 'A', starts=2),
    Scenario('two parts, a lost answer', 'AB', 'is lost'),
    Scenario('two parts, one fails, a lost answer', 'AB', 'is lost', failing='A'),
    Scenario('two parts, a death', 'AB', 'dies'),
    Scenario('two parts, a death, the body stores no state', 'AB', 'dies', is_silent=True),
    Scenario('two parts, the first delivered twice', 'AAB'),
    Scenario('two parts, the last delivered twice', 'ABB'),
    Scenario('three parts', 'ABC'),
    Scenario('one part delivered three times, a lost answer', 'AAA', 'is lost'),
    Scenario('two parts, their chord started twice', 'AB', starts=2),
]
SEARCHES = {'as listed': lambda ids, size: ids[:], 'reversed': lambda ids, size: ids[::-1]}
Choice = namedtuple('Choice', 'name fate key is_read')


class Died(BaseException):
    """The worker's process is gone: no code in it handles this."""


class App(Celery):
    backend = property(lambda self: threading.current_thread().backend)

    def send_task(self, name, args=None, kwargs=None, task_id=None, **options):
        me = threading.current_thread()
        me.stop_before(f'sends {task_id} {args}')
        me.schedule.bodies += [list(args)] if task_id == 'body' else []
        message = json.dumps([task_id, options.get('group_id'), options.get('chord')])
        for number in range(me.schedule.scenario.parts.count(task_id) or 1):
            me.schedule.begin(f'{task_id}{number + 1} from {me.name}', work_on, message)
        return self.AsyncResult(task_id)


class Delivery(threading.Thread):
    """A message in a worker of its own; it stops before each step until it is told to go on."""

    def __init__(self, schedule, name, work):
        super().__init__(name=name, daemon=True)
        self.schedule, self.work, self.backend = schedule, work, celery_s3.S3Backend(APP)
        self.step, self.fate = '', ''
        self.may_go, self.has_stopped = threading.Semaphore(0), threading.Semaphore(0)

    def run(self):
        try:
            function, *args = self.work
            function(self.schedule.scenario, *args)
        except Died:
            pass
        except Exception as error:
            self.schedule.wrong.append(f'{self.name} raised {error!r}')
        self.step = ''
        self.has_stopped.release()

    def stop_before(self, step, key=None, fates=('goes on', 'dies')):
        if self.fate != 'dies':  # else a block 'finally' is here, but the dead send nothing
            self.step, self.key, self.fates = step, key or self.name, fates
            self.has_stopped.release()
            self.may_go.acquire()
        self.schedule.lines.append(f'{self.name}: {self.fate}: {step}')
        if self.fate == 'dies':
            raise Died

    def go_on(self, fate):
        self.fate = fate
        self.may_go.release()
        self.has_stopped.acquire()


def copy_bucket(bucket):
    """Stands in for Bucket(), which takes 20 ms; this one knows as little as a new one."""
    bucket = copy(bucket)
    bucket.etags = LRUCache(limit=99)
    return bucket


def send_once(bucket, request, operation, refusals, **kwargs):
    """Stands in for Bucket._send_once(), and answers as AWS does."""
    me, key = threading.current_thread(), request.url.rpartition('/')[2]
    is_read, is_new = request.method == 'GET', 'If-None-Match' in request.headers
    match = request.headers.get('If-Match', '').strip('"')
    # To lose a read's answer is to read later; to die before it, to die after the last write.
    fates = ('goes on',) if is_read else ('goes on', 'is lost', 'dies')
    me.stop_before(f'{request.method} {key} {"if new" if is_new else match[:5]}', key, fates)
    value = me.schedule.objects.get(key)
    etag = value and md5(value).hexdigest()
    is_missing = value is None and (is_read or match)
    if is_missing or (value is not None and (is_new or match not in ('', etag))):
        assert ('NoSuchKey' if is_missing else 412) in refusals
        value = etag = None
    elif request.method == 'PUT':
        value, etag = request.data, md5(request.data).hexdigest()
        me.schedule.objects[key] = value
        me.schedule.puts.append((key, value.decode()))
    elif request.method == 'DELETE':
        me.schedule.objects.pop(key, None)
    me.schedule.lines[-1] += f' -> {str(etag)[:5]} {str(value)[:60]}'
    if me.fate == 'is lost':
        raise ConnectionClosedError(endpoint_url=request.url)
    return value, etag


def sleep(seconds):
    """Stands in for time.sleep(); the pauses between attempts are 0 here."""
    if seconds:
        threading.current_thread().stop_before(f'sleeps {seconds} s')
        threading.current_thread().stop_before('wakes', fates=('goes on',))


def start_chord(scenario):
    ids = sorted(set(scenario.parts))
    parts = [APP.signature('part', options={'task_id': task_id}) for task_id in ids]
    whole = chord(parts, APP.signature('body'), app=APP).set(task_id='header')
    whole.apply_async(task_id='body')


def work_on(scenario, message):
    task_id, group_id, body = json.loads(message)
    request = Context(id=task_id, group=group_id, chord=body)
    if task_id == scenario.failing:
        APP.backend.mark_as_failure(task_id, ValueError('boom'), request=request)
    elif task_id != 'body' or not scenario.is_silent:
        APP.backend.mark_as_done(task_id, f'result of {task_id}', request)
    threading.current_thread().stop_before('acknowledges its message')


class Schedule:
    """One run of a scenario: its chord has been started, and its parts have been sent."""

    def __init__(self, scenario):
        self.scenario, self.fate = scenario, scenario.fate
        self.objects, self.deliveries = {}, {}
        self.bodies, self.puts, self.lines, self.wrong = [], [], [], []
        self.begin('start', start_chord)
        while self.deliveries['start'].step:
            self.deliveries['start'].go_on('goes on')
        if scenario.starts == 2:
            self.begin('second start', start_chord)

    def begin(self, name, *work):
        self.deliveries[name] = Delivery(self, name, work)
        self.deliveries[name].start()
        self.deliveries[name].has_stopped.acquire()

    def find_choices(self):
        stopped = [one for one in self.deliveries.values() if one.step]
        awake = [one for one in stopped if one.step != 'wakes']
        if not awake:
            awake = stopped
            for one in stopped:
                one.step = 'has woken'
        choices = []
        for one in awake:
            for fate in {'goes on', self.fate}.intersection(one.fates):
                key = one.name if fate == 'dies' else one.key
                choices.append(Choice(one.name, fate, key, is_read=one.fates == ('goes on',)))
        return sorted(choices, key=lambda choice: choice.fate != 'goes on')

    def take(self, choice):
        one = self.deliveries[choice.name]
        one.go_on(choice.fate)
        if choice.fate != 'goes on':
            self.fate = ''
        if choice.fate == 'dies':
            self.begin(f'{one.name}, again', *one.work)

    def find_wrong(self):
        scenario = self.scenario
        stored = [value for key, value in self.puts if key == 'celery-task-meta-body']
        right = 'boom' if scenario.failing else '"result of body"'
        if len(stored) != (not scenario.is_silent) or any(right not in one for one in stored):
            self.wrong.append(f'stored for the body: {stored}')
        counts = [0] if scenario.failing else range(1, scenario.starts + 1)
        # The one case in which it may be sent twice: nothing tells that the dead one has sent it.
        if scenario.is_silent and 'dies: DELETE celery-taskset' in str(self.lines):
            counts = [2]
        values = [f'result of {task_id}' for task_id in sorted(set(scenario.parts))]
        if len(self.bodies) not in counts or any(args != [values] for args in self.bodies):
            self.wrong.append(f'sent to the body: {self.bodies}')
        left = {key for key in self.objects if not key.startswith('celery-task-meta-')}
        if scenario.starts == 2 or 'dies: ' in str(self.lines):
            left -= {'celery-taskset-meta-header', 'chord-unlock-header'}
        if left:
            self.wrong.append(f'left behind: {left}')
        return self.wrong


def commute(choice, other):
    if choice.name == other.name or choice.fate == other.fate != 'goes on':
        return False  # one delivery, or the fate that befalls one of them alone
    return choice.key != other.key or (choice.is_read and other.is_read)


def follow(path, schedule):
    """Take the path and, after its end, what comes first; whether no earlier run is the same.

    The path has, for each step, the untried choices, of which the first one is taken, and the done
    ones: every schedule that begins with one of them has been run, in some order."""
    done, depth = [], 0
    while choices := schedule.find_choices():
        if depth == len(path):
            path.append(([choice for choice in choices if choice not in done], done))
        untried, done = path[depth]
        if not untried:
            return False
        schedule.take(untried[0])
        done = [choice for choice in done if commute(choice, untried[0])]
        depth += 1
    return True


def explore(scenario, deadline):
    """Run schedules until none is left, one ends wrong or time is up: how many, and which."""
    path, ran = [], 0
    while time.monotonic() < deadline:
        schedule = Schedule(scenario)
        is_new = follow(path, schedule)
        ran += is_new
        if is_new and schedule.find_wrong():
            print(*schedule.lines, *schedule.wrong, sep='\n')
            return ran, 'wrong'
        for one in schedule.deliveries.values():
            if one.step:
                one.go_on('dies')
        while path and len(path[-1][0]) < 2:
            path.pop()
        if not path:
            return ran, 'all'
        untried, done = path[-1]
        done.append(untried.pop(0))
    return ran, 'not all'


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--seconds', type=float, default=300)
    deadline = time.monotonic() + parser.parse_args().seconds
    if hasattr(os, 'sched_setaffinity'):  # threads wake each other much faster on one CPU
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    logging.disable()
    celery_s3.Bucket._send_once = send_once
    celery_s3.time = SimpleNamespace(sleep=sleep, monotonic=time.monotonic)
    celery_s3.Bucket = partial(copy_bucket, celery_s3.Bucket('b'))
    runs = [(scenario, search) for scenario in SCENARIOS for search in SEARCHES]
    for number, (scenario, search) in enumerate(runs):
        celery_s3.random = SimpleNamespace(sample=SEARCHES[search], uniform=lambda a, b: 0)
        began = time.monotonic()
        ran, end = explore(scenario, began + (deadline - began) / (len(runs) - number))
        seconds = time.monotonic() - began
        print(f'{scenario.name:45} {search:9} {ran:6} {end:8} {seconds:6.1f} s', flush=True)
        if end == 'wrong':
            sys.exit(1)


APP = App(broker='memory://', set_as_current=False)
main()
