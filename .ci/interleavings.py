"""Prove the chords of celery_s3: walk through every interleaving of its own code, to the end.

What a delivery of a message does next is determined by the answers that it has had so far. So the
code is asked once for each such history: it begins anew, is given these answers, and is stopped at
its next step. All else is a walk through states, of which none is visited twice. At each place in
turn an answer is lost, or a worker dies and its message is delivered again.
"""

import gc
import json
import os
import sys
import time
from collections import Counter, defaultdict, namedtuple
from copy import deepcopy
from functools import cache
from hashlib import md5
from operator import attrgetter
from types import SimpleNamespace

from celery import Celery, chord

sys.path.insert(0, os.getcwd())
import celery_s3

# Each letter is a part, as often as it is delivered. The starter of the chord is delivered as often
# as `starts` says; 0 means that it has started the chord before.
Scenario = namedtuple('Scenario', 'name parts lost deaths starts failing silent')
Scenario.__new__.__defaults__ = 0, 0, 0, '', False
SCENARIOS = [
    Scenario('two parts, a lost answer', 'AB', lost=1),
    Scenario('two parts, two lost answers', 'AB', lost=2),
    Scenario('two parts, a death', 'AB', deaths=1),
    Scenario('two parts, two deaths', 'AB', deaths=2),
    Scenario('two parts, a death and a lost answer', 'AB', deaths=1, lost=1),
    Scenario('one of two fails, a lost answer', 'AB', lost=1, failing='A'),
    Scenario('one of two fails, a death', 'AB', deaths=1, failing='B'),
    Scenario('two parts, the body stores no state, a death', 'AB', deaths=1, silent=True),
    Scenario('one part delivered three times, a lost answer', 'AAA', lost=1),
    Scenario('the first of two delivered twice', 'AAB'),
    Scenario('the last of two delivered twice', 'ABB'),
    Scenario('the first of two delivered twice, a death', 'AAB', deaths=1),
    Scenario('the last of two delivered twice, a death', 'ABB', deaths=1),
    Scenario('three parts', 'ABC'),
    Scenario('three parts, a lost answer', 'ABC', lost=1),
    Scenario('three parts, a death', 'ABC', deaths=1),
    Scenario('four parts', 'ABCD'),
    Scenario('two parts, a death, also of the starter', 'AB', deaths=1, starts=1),
    Scenario('two parts, started twice', 'AB', starts=2),
    Scenario('one part, started twice, a death', 'A', deaths=1, starts=2),
]
ORDERS = {'as listed': list.sort, 'reversed': lambda ids: ids.sort(reverse=True)}
ENDS = ('sends', 'body'), ('sends', 'errback')  # of a chord; nobody runs the errback
START = ('start', None, None)  # the message to the starter
RESULT, RECORD, NOTE = 'celery-task-meta-', 'celery-taskset-meta-', 'chord-unlock-'
EXISTS, MISSING, LOST = 'PreconditionFailed', 'NoSuchKey', 'done, but the answer is lost'
BUCKET = celery_s3.Bucket(bucket='b')
# What is not used here; and no threads, so tasks are looked at one after the other.
vars(BUCKET).update(_lock=None, _session=None, _http=None, _threads=SimpleNamespace(map=map))
State = namedtuple('State', 'objects deliveries tally')  # of the deliveries, those not ended
# How many answers may still be lost and workers die; how many nonces are out; what the chord sent
# in the end, how often a death or a second start allows that once more, and whether it allows that
# something is left in the bucket.
Tally = namedtuple('Tally', 'lost deaths nonces sent more stays')
Move = namedtuple('Move', 'before event after state')  # deliveries before and after; new ones last
Stop = type('Stop', (BaseException,), {})  # it ends a run of the code before its next step


class Delivery:
    """A history: a message, the answers so far, and the step that the code takes next."""

    count, running = 0, None

    def __init__(self, scenario, message, answers=()):
        self.scenario, self.message, self.answers = scenario, message, answers
        self.backend, self.steps, self.next = celery_s3.S3Backend(APP), [], {}
        Delivery.count, Delivery.running, self.number = Delivery.count + 1, self, Delivery.count
        try:
            self.work(*message)
            self.ask('ends', '')
        except Stop:
            pass
        except Exception as error:
            self.steps.append(('raises', repr(error)))
        self.step = self.steps[-1] if len(answers) < 100 else ('raises', 'it comes to no end')
        self.has_sent = any(step[:2] in ENDS for step in self.steps[:-1])
        self.is_begun = answers or message[0] == 'body'
        # What nobody else notices: a local step, or to read a result that is stored, as it stays.
        self.is_local = self.step[0] in ('draws', 'sends', 'ends')
        is_read = self.step[0] == 'GET' or self.step[-1] == 'If-None-Match: *'
        self.result = self.step[1] if answers and is_read and RESULT in self.step[1] else None

    def work(self, task_id, group_id, body):
        if self.message == START:
            ids = sorted(set(self.scenario.parts))
            parts = [APP.signature('part').set(task_id=part) for part in ids]
            errback = APP.signature('errback').set(task_id='errback')
            whole = chord(parts, APP.signature('body').set(link_error=[errback]), app=APP)
            return whole.set(task_id='header').apply_async(task_id='body')
        request = celery_s3.Context(id=task_id, group=group_id, chord=json.loads(body))
        if task_id == self.scenario.failing:
            self.backend.mark_as_failure(task_id, ValueError('boom'), request=request)
        else:
            self.backend.mark_as_done(task_id, f'result of {task_id}', request)

    def ask(self, *step):
        """The answer to this step. Without one the code stops; what it does then is no step."""
        if len(self.steps) <= len(self.answers):
            self.steps.append(step)
        if len(self.steps) > len(self.answers):
            raise Stop
        return self.answers[len(self.steps) - 1]

    def after(self, answer):
        if answer not in self.next:
            self.next[answer] = Delivery(self.scenario, self.message, (*self.answers, answer))
            assert self.next[answer].steps[: len(self.steps)] == self.steps
        return self.next[answer]


class App(Celery):
    backend = property(lambda self: Delivery.running.backend)
    now = staticmethod(lambda: SimpleNamespace(isoformat=lambda: '2026-11-29T00:00:00'))

    def send_task(self, name, args=None, kwargs=None, task_id=None, **options):
        group_id = options.get('group_id') if name == 'part' else None  # else a random one
        message = (task_id, group_id, json.dumps(options.get('chord')))
        Delivery.running.ask('sends', task_id, str(args), message)
        return self.AsyncResult(task_id)


def send_once(bucket, request, operation, refusals):
    """Stands in for Bucket._send_once()."""
    names = [name for name in ('If-Match', 'If-None-Match') if name in request.headers]
    condition = ''.join(f'{name}: {request.headers[name]}' for name in names)
    key = request.url.rpartition('/')[2]
    answer = Delivery.running.ask(request.method, key, request.data, condition)
    if answer == LOST:
        raise celery_s3.exceptions.ConnectionClosedError(endpoint_url=request.url)
    if answer in refusals:
        return None, None
    if isinstance(answer, str):
        raise celery_s3.exceptions.ClientError({'Error': {'Code': answer}}, operation)
    return answer, md5(answer or request.data).hexdigest()


@cache
def answer_as_s3(objects, method, key, value, condition):
    """What S3 answers, and the objects then: pairs of key and value."""
    others = dict(objects)
    found = others.pop(key, None)
    if method == 'GET':
        return found or MISSING, objects
    if condition and condition != f'If-Match: "{md5(found or b"").hexdigest()}"':
        if found or condition != 'If-None-Match: *':
            return EXISTS if found else MISSING, objects
    then = frozenset([*others.items(), *[(key, value)] * (method == 'PUT')])
    return b'', KNOWN.setdefault(then, then)  # the same one if equal: quick to compare


KNOWN, contents = {}, cache(dict)


class Search:
    """A walk through the states of a scenario."""

    def __init__(self, scenario, deadline):
        self.scenario, self.deadline = scenario, deadline
        self.seen, self.path, Delivery.count = set(), [], 0
        self.deliver = cache(lambda message: Delivery(scenario, message))
        self.choose = cache(lambda *situation: [*self.find_choices(*situation)])
        starters = (self.deliver(START),) * max(1, scenario.starts)
        state = State(frozenset(), starters, Tally(0, 0, 0, (), 0, False))
        while not scenario.starts and any(one.message == START for one in state.deliveries):
            state = next(self.find_moves(*state)).state
        tally = state.tally._replace(lost=scenario.lost, deaths=scenario.deaths)
        self.first = Move((), '', state.deliveries, state._replace(tally=tally))

    def visit(self, move):
        """Visit the state that the move leads to, and those after it. Exits at a wrong end."""
        if time.monotonic() > self.deadline:
            raise TimeoutError
        self.seen.add(move.state)
        self.path.append(move)
        moves = [*self.find_moves(*move.state)]
        problem = '' if moves else self.find_problem(*move.state)
        if problem:
            sys.exit('\n'.join([f'WRONG: {self.scenario.name}', *tell(self.path), problem]))
        for after in moves:
            if after.state not in self.seen:
                self.visit(after)
        self.path.pop()

    def find_moves(self, objects, deliveries, tally):
        local = [one for one in deliveries if one.is_local or one.result in contents(objects)]
        for one in local[:1] or dict.fromkeys(deliveries):
            place = deliveries.index(one)
            others = deliveries[:place] + deliveries[place + 1 :]
            for event, after, *rest in self.choose(one, objects, tally):
                ordered = tuple(sorted(others + after, key=NUMBER))
                yield Move((one,), event, after, State(rest[0], ordered, rest[1]))
        # A pause outlasts what has begun, and the body. A part may be delivered after it.
        begun = [one for one in deliveries if one.is_begun]
        if begun and all(one.step[0] == 'waits' for one in begun):
            after = [one.after('woken') for one in begun]
            new = [one for one in deliveries if not one.is_begun]
            ordered = tuple(sorted(new + after, key=NUMBER))
            yield Move(begun, 'woken', after, State(objects, ordered, tally))

    def find_choices(self, one, objects, tally):
        """Yield what may happen to this one, what it becomes, the objects and the tally then."""
        kind, key, *_ = one.step
        keys = contents(objects)
        is_seen = self.scenario.failing or not self.scenario.silent
        if kind == 'ends':
            yield 'done', (), objects, tally
        elif kind == 'draws':
            nonce = f'nonce {tally.nonces + 1}'
            yield nonce, (one.after(nonce),), objects, tally._replace(nonces=tally.nonces + 1)
        elif kind == 'sends':
            copies = self.scenario.parts.count(key) + (key == 'body' and not self.scenario.silent)
            sent = (*tally.sent, key + one.step[2]) if one.step[:2] in ENDS else tally.sent
            after = one.after('sent'), *[self.deliver(one.step[-1])] * copies
            yield 'done', after, objects, tally._replace(sent=sent)
        elif kind in ('GET', 'PUT', 'DELETE'):
            answer, then = answer_as_s3(objects, *one.step)
            if then is not objects and key in keys and RESULT in key:
                tally = tally._replace(sent=(*tally.sent, f'{key} again'))
            if then is not objects and one.message == START and tally.sent:
                more = tally.more + (NOTE in key and key not in keys)
                tally = tally._replace(more=more, stays=True)
            yield answer, (one.after(answer),), then, tally
            if tally.lost and answer == b'':
                yield LOST, (one.after(LOST),), then, tally._replace(lost=tally.lost - 1)
        # To die before a read is to die after the last write.
        if tally.deaths and one.answers and kind not in ('GET', 'draws', 'raises'):
            is_silent = self.scenario.silent or self.scenario.failing
            is_told = RESULT + 'body' in keys or not any(RECORD in key for key in keys)
            more = tally.more + bool(one.has_sent and is_silent and not is_told)
            stays = tally.stays or one.has_sent
            then = tally._replace(deaths=tally.deaths - 1, more=more, stays=stays)
            yield 'DIES', (self.deliver(one.message),), objects, then

    def find_problem(self, objects, deliveries, tally):
        """What is wrong with this end."""
        if deliveries:
            return deliveries[0].step
        right = {part: f'result of {part}' for part in sorted(self.scenario.parts)}
        call = f'body({list(right.values())},)'
        if not self.scenario.silent:
            right['body'] = 'result of body'
        if self.scenario.failing:
            right[self.scenario.failing] = right['body'] = 'boom'
            call = "errback('body',)"
        if not 1 <= len(tally.sent) <= 1 + tally.more or set(tally.sent) != {call}:
            return f'sent: {tally.sent}; right is {call}'
        left = {**contents(objects)}
        for task_id in right:
            value = left.pop(RESULT + task_id, b'')
            if right[task_id] not in value.decode():
                return f'the result of {task_id}: {value}'
        return f'left in the bucket: {left}' if left and not tally.stays else ''


def tell(path):
    """Who took which step, and what happened then, a line each."""
    names, counts = defaultdict(list), Counter()
    for before, event, after, _ in path:
        here = [names[one].pop() for one in before]
        for name, one in zip(here, before):
            yield f'{name} {" ".join(map(brief, one.step[:4]))} -> {brief(event) or "done"}'
        for one in after[len(before) :]:
            counts[one.message[0]] += 1
            here.append(f'{one.message[0]}{counts[one.message[0]]}')
        for name, one in zip(here, after):
            names[one].append(name)


def brief(part):
    text = part.decode() if isinstance(part, bytes) else str(part)
    meta = json.loads(text) if '"status"' in text else None
    return f'{meta["status"]}: {meta["result"]}' if meta else text


APP = App(broker='memory://', set_as_current=False)
NUMBER = attrgetter('number')
gc.disable()
celery_s3.logger.disabled = True
celery_s3.Bucket._send_once, celery_s3.Bucket = send_once, lambda: deepcopy(BUCKET)
celery_s3.uuid = lambda: Delivery.running.ask('draws', 'a nonce')
celery_s3.time = SimpleNamespace(sleep=lambda s: s and Delivery.running.ask('waits', f'{s} s'))
searches = [(scenario, order) for scenario in SCENARIOS for order in ORDERS]
deadline = time.monotonic() + float(sys.argv[2] if sys.argv[1:2] == ['--seconds'] else 300)
have_ended = True
for number, (scenario, order) in enumerate(searches):
    celery_s3.random = SimpleNamespace(shuffle=ORDERS[order], uniform=lambda least, most: 0)
    began = time.monotonic()
    # The last ones take the longest, so three shares of the time that is left.
    share = 3 * (deadline - began) / (len(searches) - number)
    search, end = Search(scenario, min(began + share, deadline)), ''
    try:
        search.visit(search.first)
    except TimeoutError:
        have_ended, end = False, ': NOT ALL'
    numbers = f'{len(search.seen):7} states {Delivery.count:5} runs {time.monotonic() - began:6.1f} s'
    print(f'{scenario.name:45} {order:9} {numbers}{end}', flush=True)
    search = None
    gc.collect()
sys.exit(not have_ended)
