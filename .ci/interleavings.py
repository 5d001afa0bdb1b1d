"""Prove the chords of celery_s3: walk through every interleaving of its own code, to the end.

What a delivery does next is determined by the answers that it has had: so the code is asked once
for each such history, and stopped at its next step. All else is a walk through states, each seen
once. At each place in turn, an answer is lost, or a worker dies and its message comes again."""

import json
import sys
import time
from collections import defaultdict, namedtuple
from copy import copy
from functools import cache
from hashlib import md5
from itertools import count
from types import SimpleNamespace

from celery import Celery, canvas, chord

sys.path.insert(0, '')
import celery_s3

# A letter is a part, as often as each start has it delivered. A body that is not the last one is
# itself the last part of the next chord. The chord is started as often as said; 0 means once, by a
# worker that does not die. Two parts and more are looked at in two orders.
NAMES, DEFAULTS = 'name parts fates starts failing bodies stores', (0, '', ('body',), True)
Scenario = namedtuple('Scenario', NAMES, defaults=DEFAULTS)
TWO = 'body', 'outer'
SCENARIOS = [
    Scenario('two parts', 'AB', ['lost', 'lost lost', 'dies', 'dies dies', 'dies lost']),
    Scenario('one of two fails', 'AB', ['lost', 'dies'], failing='A'),
    Scenario('two, the body stores no state', 'AB', ['dies'], stores=False),
    Scenario('one delivered twice, no state', 'AA', ['dies'], stores=False),
    Scenario('one part, started twice', 'A', ['', 'lost'], starts=2),
    Scenario('the body is a last part', 'A', ['lost', 'dies', 'dies dies'], bodies=TWO),
    Scenario('such a body fails', 'A', ['dies', 'dies dies'], failing='body', bodies=TWO),
    Scenario('its part fails', 'A', ['lost', 'dies', 'dies dies'], failing='A', bodies=TWO),
    Scenario('its part fails, starter may die', 'A', ['dies'], starts=1, failing='A', bodies=TWO),
    Scenario('one delivered three times', 'AAA', ['lost']),
    Scenario('the first of two delivered twice', 'AAB', ['', 'dies']),
    Scenario('the last of two delivered twice', 'ABB', ['', 'dies']),
    Scenario('three parts', 'ABC', ['', 'lost', 'dies']),
    Scenario('four parts', 'ABCD', ['']),
    Scenario('its part fails, delivered twice', 'AA', ['dies'], failing='A', bodies=TWO),
    Scenario('one part, started twice', 'A', ['dies', 'dies lost'], starts=2),
    Scenario('one twice, the starter may die', 'AA', ['dies'], starts=1),
    Scenario('two parts, the starter may die', 'AB', ['dies'], starts=1),
    Scenario('one part, started three times', 'A', [''], starts=3),
    Scenario('one delivered and started twice', 'AA', [''], starts=2),
    Scenario('two parts, started twice', 'AB', [''], starts=2),
]
ORDERS = {'as listed': list.sort, 'reversed': lambda ids: ids.sort(reverse=True)}
RESULT, RECORD, NOTE = 'celery-task-meta-', 'celery-taskset-meta-', 'chord-unlock-'
LOST, MISSING = 'done, but the answer is lost', 'NoSuchKey'
BUCKET = celery_s3.Bucket(celery_s3.Settings(bucket='b'))
BUCKET._threads = SimpleNamespace(map=map)
# A state: the objects, the deliveries that have not ended, and a tally: the fates and nonces; what
# the chord sent; how much more of it, and whether leftovers, are explained by a death or a start.
Tally = namedtuple('Tally', 'lost deaths nonces sent more stays', defaults=[(), (), 0, False])
Stop = type('Stop', (BaseException,), {})  # it ends a run of the code before its next step


class Delivery:  # a history: a message, the answers so far, and the step that the code takes next
    def __init__(self, search, message, answers=()):
        self.search, self.message, self.answers = search, message, answers
        self.backend, self.steps, self.number = celery_s3.S3Backend(APP), [], next(search.numbers)
        Delivery.running = self
        try:
            self.work(search.scenario, *message)
            self.ask('ends', '')
        except Stop:  # the steps before are those of the shorter history
            assert not answers or search.deliver(message, answers[:-1]).steps == self.steps[:-1]
        except Exception as error:
            self.steps.append(('raises', repr(error)))
        # Whether it has begun to send a body, or is one.
        self.is_busy = message[0] in search.scenario.bodies or '"sending"' in str(self.steps[:-1])
        self.step = self.steps[-1] if len(answers) < 100 else ('raises', 'it comes to no end')

    def __lt__(self, other):
        return self.number < other.number

    def work(self, scenario, task_id, body):
        if task_id == 'start':
            parts = [APP.signature(part).set(task_id=part) for part in sorted({*scenario.parts})]
            for name in scenario.bodies:
                body = APP.signature(name).set(task_id=name, link_error=[APP.signature('errback')])
                parts = [chord(parts, body, app=APP)]
            return parts[0].apply_async(task_id=name)
        request = celery_s3.Context(id=task_id, group='header', chord=json.loads(body))
        if task_id == scenario.failing:
            self.backend.mark_as_failure(task_id, ValueError('boom'), request=request)
        else:
            self.backend.mark_as_done(task_id, f'result of {task_id}', request)

    def ask(self, *step):  # its answer; without one the code stops, and takes no step any more
        self.steps = [*self.steps, step][: len(self.answers) + 1]
        if len(self.steps) > len(self.answers):
            raise Stop
        return self.answers[len(self.steps) - 1]

    def after(self, answer):
        return self.search.deliver(self.message, (*self.answers, answer))


class App(Celery):
    backend = property(lambda self: Delivery.running.backend)
    now = staticmethod(lambda: SimpleNamespace(isoformat=lambda: '2026-11-29T00:00:00'))

    def send_task(self, name, args=None, kwargs=None, task_id=None, **options):
        message = name, json.dumps(options.get('chord'))
        Delivery.running.ask('sends', name, str(args), message)
        return self.AsyncResult(task_id)


def exchange(bucket, request):  # stands in for Bucket._exchange()
    condition = ''.join(f'{k}: {v}' for k, v in request.headers.items() if k.startswith('If-'))
    key = request.url.rpartition('/')[2]
    content = Delivery.running.ask(request.method, key, request.data, condition)
    if content == LOST:
        raise celery_s3.botocore.exceptions.ConnectionClosedError(endpoint_url=request.url)
    if isinstance(content, str):
        content = f'<Error><Code>{content}</Code></Error>'.encode()
        return SimpleNamespace(status_code=412, headers={}, content=content)
    etag = md5(content or request.data or b'').hexdigest()
    return SimpleNamespace(status_code=200, headers={'etag': etag}, content=content)


def answer_as_s3(objects, method, key, value, condition):  # the answer, and the objects then
    others = dict(objects)
    found = others.pop(key, None)
    if method == 'GET':
        return found or MISSING, objects
    met = f'If-Match: {md5(found).hexdigest()}' if found else 'If-None-Match: *'
    if condition.replace('"', '') not in ('', met):
        return 'PreconditionFailed' if found else MISSING, objects
    return b'', frozenset([*others.items(), *[(key, value)] * (method == 'PUT')])


class Search:  # a walk through the states of a scenario, depth first
    def __init__(self, scenario, lost, deaths, deadline):
        self.scenario, self.deadline, self.seen, self.path = scenario, deadline, set(), []
        self.numbers, self.deliver = count(), cache(lambda *history: Delivery(self, *history))
        self.choose = cache(lambda *situation: [*self.find_choices(*situation)])
        starters = (self.deliver(('start', None)),) * max(1, scenario.starts)
        self.visit([(None, '', starters)], (frozenset(), starters, Tally(lost, deaths)))

    def visit(self, steps, state):  # to which these steps lead, and all after it
        self.seen.add(state)
        self.path.append(steps)
        moves = [*self.find_moves(*state)]
        if not moves and not self.is_right(*state):
            end = f'{[one.step for one in state[1]]} {dict(state[0])} {state[2]}'
            sys.exit('\n'.join([f'WRONG: {self.scenario}', *tell(sum(self.path, [])), end]))
        for move in moves:
            if move[1] not in self.seen and time.monotonic() < self.deadline:
                self.visit(*move)
        self.path.pop()

    def find_moves(self, objects, deliveries, tally):  # steps to be taken next, the state after
        # A pause outlasts the sending of a body, and the body, but not all else that has begun.
        is_busy = any(one.is_busy for one in deliveries if one.step[0] != 'waits')
        for one in dict.fromkeys(deliveries):
            place = deliveries.index(one)
            others = deliveries[:place] + deliveries[place + 1 :]
            for steps, after, then, later in self.choose(one, objects, tally):
                if not (is_busy and one.step[0] == 'waits' and steps[0][1] == 'done'):
                    yield steps, (then, tuple(sorted(others + after)), later)

    def find_choices(self, one, objects, tally):  # find_events(), and what nobody notices at once
        for event, after, *rest in self.find_events(one, objects, tally):
            if after and after[0].step[0] in ('draws', 'sends', 'ends'):
                for steps, last, *rest_then in self.choose(after[0], *rest):
                    yield [(one, event, after), *steps], last + after[1:], *rest_then
            else:
                yield [(one, event, after)], after, *rest

    def find_events(self, one, objects, tally):  # what may happen to it, what is there then
        kind, key, *details = one.step
        keys, name = dict(objects), one.message[0]
        answer, new, then, later = 'done', [], objects, tally
        if kind == 'draws':
            nonces = tuple(sorted([*tally.nonces, name]))
            answer, later = f'{name} {nonces.count(name)}', tally._replace(nonces=nonces)
        elif kind == 'sends':
            new = [self.deliver(details[1])] * (self.scenario.parts.count(key) or self.runs(key))
            if key not in self.scenario.parts:
                answer, later = 'sent', tally._replace(sent=(*tally.sent, key + details[0]))
        elif kind in ('GET', 'PUT', 'DELETE'):
            answer, then = answer_as_s3(objects, *one.step)
            if then != objects and name == 'start' and NOTE in key and tally.sent:
                later = tally._replace(more=tally.more + 1, stays=True)  # it starts what has ended
            if tally.lost and answer == b'':
                stays = later.stays or (name == 'start' and NOTE in key)
                lost = later._replace(lost=tally.lost - 1, stays=stays)
                yield LOST, (one.after(LOST),), then, lost
        if kind != 'raises':
            yield answer, () if kind == 'ends' else (one.after(answer), *new), then, later
        # To die before a read is to die after the last write.
        is_mortal = one.answers and (name != 'start' or self.scenario.starts) and tally.deaths
        if is_mortal and kind not in ('GET', 'draws', 'raises'):
            # It may send again what neither a state nor the record shows.
            calls = [step[1:3] for step in one.steps[:-1] if step[0] == 'sends']
            sent = str([call for call in calls if not self.runs(call[0])])
            unseen = [body for body in self.scenario.bodies if RESULT + body not in keys]
            more = tally.more + sum(body in sent for body in unseen) * (RECORD in str(keys))
            stays = tally.stays or name == 'start'
            later = Tally(tally.lost, tally.deaths - 1, *tally[2:4], more, stays)
            yield 'DIES', (self.deliver(one.message),), objects, later

    def runs(self, name):  # whether this is a body that runs, and stores its state
        return name in self.scenario.bodies and self.scenario.stores

    def is_right(self, objects, deliveries, tally):  # all that is asked of an end
        parts, fails, calls, stored = sorted({*self.scenario.parts}), False, set(), dict(objects)
        for body in self.scenario.bodies:
            fails = fails or self.scenario.failing in parts
            values = [f'result of {part}' for part in parts]
            calls.add(f"errback('{body}',)" if fails else f'{body}({values},)')
            parts = [body]
            state = 'boom' if fails or body == self.scenario.failing else f'result of {body}'
            if (state if self.scenario.stores else 'None') not in str(stored.get(RESULT + body)):
                return False
        is_sent = {*tally.sent} == calls and len(tally.sent) <= len(calls) + tally.more
        is_clean = tally.stays or all(RESULT in key for key in stored)
        return not deliveries and is_sent and is_clean


def tell(steps):  # who took which step, and what happened then, a line each
    names, numbers = defaultdict(list), count(1)
    for one, event, after in steps:
        here = [names[one].pop()] if one else []
        if one:
            yield ' '.join(f'{text!s:.90}' for text in [*here, *one.step, '->', event])
        here += [f'{new.message[0]}{next(numbers)}' for new in after[len(here) :]]
        for name, new in zip(here, after):
            names[new].append(name)


APP = App(broker='memory://', set_as_current=False)
celery_s3.logger.disabled = celery_s3.S3ChordBackend._is_trusted = True  # no probe
celery_s3.Bucket._exchange, celery_s3.Bucket = exchange, lambda settings: copy(BUCKET)
canvas.uuid = lambda: 'header'
celery_s3.uuid = lambda: Delivery.running.ask('draws', 'a nonce')
celery_s3.time = SimpleNamespace(sleep=lambda s: s and Delivery.running.ask('waits', f'{s} s'))
searches = [(one, fates, order) for one in SCENARIOS for fates in one.fates for order in ORDERS]
searches = [each for each in searches if len({*each[0].parts}) > 1 or each[2] == 'as listed']
deadline = time.monotonic() + float(sys.argv[2] if sys.argv[1:2] == ['--seconds'] else 600)
late = 0
for number, (scenario, fates, order) in enumerate(searches):
    celery_s3.random = SimpleNamespace(shuffle=ORDERS[order], uniform=lambda least, most: 0)
    began = time.monotonic()  # the last ones take the longest, so each has three shares
    latest = min(began + 3 * (deadline - began) / (len(searches) - number), deadline)
    search = Search(scenario, fates.count('lost'), fates.count('dies'), latest)
    took = time.monotonic() - began
    late += began + took > latest
    end = f'{took:6.1f} s {"NOT ALL" if began + took > latest else "to the end"}'
    counts = f'{len(search.seen):7} states {next(search.numbers):5} runs'
    print(f'{scenario.name:32} {fates:9} {order:9} {counts} {end}', flush=True)
sys.exit(late)
