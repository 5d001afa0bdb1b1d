"""Prove the chords of celery_s3: run every interleaving of its own code, on a store in memory.

    python .ci/interleavings.py [--seconds N]

Run it in the root of a checkout; N is 300 unless told. Each delivery of a message is a thread that
stops before each step. A depth-first search decides who goes next, and begins again until every
order has been run; of orders that differ in steps that commute (on different keys, or both reads),
it ends one ('sleep sets'). Where a scenario says so, the answer to a write is lost after it took
effect, or a worker dies and its message comes again, at each place in turn. A sleep outlasts what
the others do. In the end the body was sent once with the right values, or has the right error, and
nothing but results is left (records may be, after a death or a second start). If not, the exit is
1, after a line for each step and what is wrong.
"""

import argparse
import json
import logging
import os
import random
import sys
import threading
import time
from collections import namedtuple
from copy import copy

from botocore.exceptions import ConnectionClosedError
from celery import Celery, chord
from celery.app.task import Context

sys.path.insert(0, os.getcwd())
import celery_s3

# Each letter is a part, as often as it is delivered. The fate befalls one step.
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
BUCKET = celery_s3.Bucket('b')


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
            me.schedule.begin(f'{task_id}{number + 1} from {me.name}', message)
        return self.AsyncResult(task_id)


class Delivery(threading.Thread):
    """A worker of its own, with a message or, without one, for the start of the chord."""

    def __init__(self, schedule, name, message):
        super().__init__(name=name, daemon=True)
        self.schedule, self.message, self.fate = schedule, message, ''
        self.backend = celery_s3.S3Backend(APP)
        self.may_go, self.has_stopped = threading.Semaphore(0), threading.Semaphore(0)

    def run(self):
        try:
            self.work() if self.message else self.start_chord()
        except Died:
            pass
        except Exception as error:
            self.schedule.errors.append(f'WRONG: {self.name} raised {error!r}')
        self.step = ''
        self.has_stopped.release()

    def start_chord(self):
        ids = sorted(set(self.schedule.scenario.parts))
        parts = [APP.signature('part', options={'task_id': task_id}) for task_id in ids]
        whole = chord(parts, APP.signature('body'), app=APP).set(task_id='header')
        whole.apply_async(task_id='body')

    def work(self):
        task_id, group_id, body = json.loads(self.message)
        request = Context(id=task_id, group=group_id, chord=body)
        if task_id == self.schedule.scenario.failing:
            self.backend.mark_as_failure(task_id, ValueError('boom'), request=request)
        elif task_id != 'body' or not self.schedule.scenario.is_silent:
            self.backend.mark_as_done(task_id, f'result of {task_id}', request)
        self.stop_before('acknowledges its message')

    def stop_before(self, step, key=None, fates=('goes on', 'dies')):
        if self.fate != 'dies':  # else a block 'finally' is here, but the dead send nothing
            self.step, self.key, self.fates = step, key or self.name, fates
            self.has_stopped.release()
            self.may_go.acquire()
            self.schedule.lines.append(f'{self.name} {self.fate}: {step}')
        if self.fate == 'dies':
            raise Died

    def go_on(self, fate):
        self.fate = fate
        self.may_go.release()
        self.has_stopped.acquire()


def make_bucket():
    """Stands in for Bucket(), which takes 20 ms; this one knows as little as a new one."""
    bucket = copy(BUCKET)
    bucket.etags = copy(BUCKET.etags)
    return bucket


def send_once(bucket, request, operation, refusals, **kwargs):
    """Stands in for Bucket._send_once(), and answers as AWS does."""
    me, key = threading.current_thread(), request.url.rpartition('/')[2]
    condition = request.headers.get('If-Match') or request.headers.get('If-None-Match')
    # To lose a read's answer is to read later; to die before it, to die after the last write.
    fates = ('goes on',) if request.method == 'GET' else ('goes on', 'is lost', 'dies')
    me.stop_before(f'{request.method} {key} {condition}', key, fates)
    value = me.schedule.objects.get(key)
    there = f'"{hash(value)}"' if value else '*'
    if condition not in (None, there):
        assert (412 if value else 'NoSuchKey') in refusals
        value = None
    elif request.method == 'PUT':
        value = me.schedule.objects[key] = request.data
        me.schedule.puts.append((key, value.decode()))
    elif request.method == 'DELETE':
        me.schedule.objects.pop(key, None)
    me.schedule.lines[-1] += f' -> {value}'
    if me.fate == 'is lost':
        raise ConnectionClosedError(endpoint_url=request.url)
    return value, value and str(hash(value))


def sleep(seconds):
    """Stands in for time.sleep(); the pauses between attempts are 0 here."""
    if seconds:
        threading.current_thread().stop_before(f'sleeps {seconds} s')
        threading.current_thread().stop_before('wakes', fates=('goes on',))


class Schedule:
    """One run of a scenario: its chord has been started, and its parts have been sent."""

    def __init__(self, scenario):
        self.scenario, self.fate = scenario, scenario.fate
        self.objects, self.deliveries = {}, {}
        self.bodies, self.puts, self.lines, self.errors = [], [], [], []
        self.begin('start')
        while self.deliveries['start'].step:
            self.deliveries['start'].go_on('goes on')
        if scenario.starts == 2:
            self.begin('second start')

    def begin(self, name, message=None):
        self.deliveries[name] = Delivery(self, name, message)
        self.deliveries[name].start()
        self.deliveries[name].has_stopped.acquire()

    def find_choices(self):
        stopped = [one for one in self.deliveries.values() if one.step]
        if all(one.step == 'wakes' for one in stopped):
            for one in stopped:
                one.step = 'has woken'
        choices = []
        for one in stopped:
            fates = [fate for fate in ('goes on', self.fate) if fate in one.fates]
            found = [Choice(one.name, fate, one.key, len(one.fates) == 1) for fate in fates]
            if one.step != 'wakes':
                choices += found
                if one.key == one.name and len(found) == 1:
                    return found  # it commutes with all that may follow: no other order matters
        return choices

    def take(self, choice):
        one = self.deliveries[choice.name]
        one.go_on(choice.fate)
        if choice.fate != 'goes on':
            self.fate = ''
        if choice.fate == 'dies':
            self.begin(f'{one.name}, again', one.message)

    def find_wrong(self):
        yield from self.errors
        scenario, lines = self.scenario, '\n'.join(self.lines)
        stored = [value for key, value in self.puts if key == 'celery-task-meta-body']
        right = 'boom' if scenario.failing else '"result of body"'
        if [right in value for value in stored] != [True] * (not scenario.is_silent):
            yield f'WRONG: stored for the body: {stored}'
        counts = [0] if scenario.failing else range(1, scenario.starts + 1)
        # The one case in which it may be sent twice: nothing tells that the dead one has sent it.
        if scenario.is_silent and 'dies: DELETE celery-taskset' in lines:
            counts = [2]
        values = [f'result of {task_id}' for task_id in sorted(set(scenario.parts))]
        if len(self.bodies) not in counts or any(args != [values] for args in self.bodies):
            yield f'WRONG: sent to the body: {self.bodies}'
        left = {key for key in self.objects if not key.startswith('celery-task-meta-')}
        if scenario.starts == 2 or 'dies: ' in lines:
            left -= {'celery-taskset-meta-header', 'chord-unlock-header'}
        if left:
            yield f'WRONG: left behind: {left}'


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
    """Run schedules until none is left or time is up: how many, and which."""
    path, ran = [], 0
    while time.monotonic() < deadline:
        schedule = Schedule(scenario)
        is_new = follow(path, schedule)
        wrong = is_new and list(schedule.find_wrong())
        if wrong:
            sys.exit('\n'.join(schedule.lines + wrong))
        ran += is_new
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
    celery_s3.Bucket._send_once, celery_s3.Bucket = send_once, make_bucket
    time.sleep, random.uniform = sleep, lambda a, b: 0
    runs = [(scenario, search) for scenario in SCENARIOS for search in SEARCHES]
    for number, (scenario, search) in enumerate(runs):
        random.sample = SEARCHES[search]
        began = time.monotonic()
        ran, end = explore(scenario, began + (deadline - began) / (len(runs) - number))
        seconds = time.monotonic() - began
        print(f'{scenario.name:45} {search:9} {ran:6} {end:8} {seconds:6.1f} s', flush=True)


APP = App(broker='memory://', set_as_current=False)
main()
