"""Prove the chords of celery_s3: walk through every interleaving of its own code, to the end.

What a delivery of a message does next is determined by the answers that it has had so far. So the
code is asked once for each such history: it begins anew, is given these answers, and is stopped at
its next step. All else is a walk through states, of which none is visited twice. At each place in
turn an answer is lost, or a worker dies and its message is delivered again.
"""

import json
import os
import sys
import time
from collections import defaultdict, namedtuple
from copy import deepcopy
from functools import cache
from hashlib import md5
from itertools import count
from types import SimpleNamespace

from celery import Celery, chord

sys.path.insert(0, os.getcwd())
import celery_s3

# Each letter is a part, as often as it is delivered. The chord is started as often as `starts`
# says; 0 means once, by a worker that does not die. If silent, it ends in what stores no state.
Scenario = namedtuple('Scenario', 'name parts fates starts failing silent', defaults=[0, '', 0])
SCENARIOS = [
    Scenario('two parts', 'AB', ['lost', 'lost lost', 'dies', 'dies dies', 'dies lost']),
    Scenario('the first of two fails', 'AB', ['lost', 'dies'], failing='A', silent=True),
    Scenario('the last of two fails', 'AB', ['lost', 'dies'], failing='B', silent=True),
    Scenario('two, the body stores no state', 'AB', ['dies'], silent=True),
    Scenario('one delivered three times', 'AAA', ['lost']),
    Scenario('the first of two delivered twice', 'AAB', ['', 'dies']),
    Scenario('the last of two delivered twice', 'ABB', ['', 'dies']),
    Scenario('three parts', 'ABC', ['', 'lost', 'dies']),
    Scenario('four parts', 'ABCD', ['']),
    Scenario('two parts, the starter may die', 'AB', ['dies'], starts=1),
    Scenario('two parts, started twice', 'AB', [''], starts=2),
    Scenario('one part, started twice', 'A', ['dies'], starts=2),
]
ORDERS = {'as listed': list.sort, 'reversed': lambda ids: ids.sort(reverse=True)}
START = ('start', None)  # the message to who starts the chord
ENDS = ('body', 'errback')  # what a chord sends in the end
RESULT, RECORD, NOTE = 'celery-task-meta-', 'celery-taskset-meta-', 'chord-unlock-'
MISSING, LOST = 'NoSuchKey', 'done, but the answer is lost'
BUCKET = celery_s3.Bucket(bucket='b')
# What is not used here; and no threads, so tasks are looked at one after the other.
vars(BUCKET).update(_lock=None, _session=None, _http=None, _threads=SimpleNamespace(map=map))
# A state is the objects, pairs of key and value; the deliveries that have not ended; and a tally:
# how many answers may still be lost and workers die; whose nonces are out; which ENDS were sent;
# how often a death or a start explains that once more, and whether it explains what is left.
Tally = namedtuple('Tally', 'lost deaths nonces sent more stays')
Stop = type('Stop', (BaseException,), {})  # it ends a run of the code before its next step


class Delivery:
    """A history: a message, the answers so far, and the step that the code takes next."""

    running = None

    def __init__(self, search, message, answers=()):
        self.search, self.message, self.answers = search, message, answers
        self.backend, self.steps, self.number = celery_s3.S3Backend(APP), [], next(search.numbers)
        Delivery.running = self
        try:
            self.work(search.scenario, *message)
            self.ask('ends', '')
        except Stop:
            assert not answers or search.deliver(message, answers[:-1]).steps == self.steps[:-1]
        except Exception as error:
            self.steps.append(('raises', repr(error)))
        self.step = self.steps[-1] if len(answers) < 100 else ('raises', 'it comes to no end')

    def __lt__(self, other):
        return self.number < other.number

    def work(self, scenario, task_id, body):
        if self.message == START:
            parts = [APP.signature('part').set(task_id=part) for part in sorted({*scenario.parts})]
            errback = APP.signature('errback').set(task_id='errback')
            whole = chord(parts, APP.signature('body').set(link_error=[errback]), app=APP)
            return whole.set(task_id='header').apply_async(task_id='body')
        request = celery_s3.Context(id=task_id, group='header', chord=json.loads(body))
        if task_id == scenario.failing:
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
        return self.search.deliver(self.message, (*self.answers, answer))


class App(Celery):
    backend = property(lambda self: Delivery.running.backend)
    now = staticmethod(lambda: SimpleNamespace(isoformat=lambda: '2026-11-29T00:00:00'))

    def send_task(self, name, args=None, kwargs=None, task_id=None, **options):
        message = (task_id, json.dumps(options.get('chord')))
        Delivery.running.ask('sends', task_id, str(args), message)
        return self.AsyncResult(task_id)


def send_once(bucket, request, operation, refusals):
    """Stands in for Bucket._send_once()."""
    condition = ''.join(f'{k}: {v}' for k, v in request.headers.items() if k.startswith('If-'))
    key = request.url.rpartition('/')[2]
    answer = Delivery.running.ask(request.method, key, request.data, condition)
    if answer == LOST:
        raise celery_s3.exceptions.ConnectionClosedError(endpoint_url=request.url)
    if isinstance(answer, str):
        assert answer in refusals, answer
        return None, None
    return answer, md5(answer or request.data).hexdigest()


@cache
def answer_as_s3(objects, method, key, value, condition):
    """What S3 answers, and the objects then."""
    others = dict(objects)
    found = others.pop(key, None)
    if method == 'GET':
        return found or MISSING, objects
    met = f'If-Match: "{md5(found).hexdigest()}"' if found else 'If-None-Match: *'
    if condition not in ('', met):
        return 'PreconditionFailed' if found else MISSING, objects
    return b'', frozenset([*others.items(), *[(key, value)] * (method == 'PUT')])


class Search:
    """A walk through the states of a scenario."""

    def __init__(self, scenario, lost, deaths, deadline):
        self.scenario, self.deadline, self.seen, self.path = scenario, deadline, set(), []
        self.numbers, self.deliver = count(), cache(lambda *history: Delivery(self, *history))
        self.choose = cache(lambda *situation: [*self.find_choices(*situation)])
        starters = (self.deliver(START),) * max(1, scenario.starts)
        tally = Tally(lost, deaths, (), (), 0, False)
        self.visit([((), '', starters)], (frozenset(), starters, tally))

    def visit(self, steps, state):
        """Visit the state that these steps lead to, and all after it. Exits at a wrong end."""
        if time.monotonic() > self.deadline:
            return
        self.seen.add(state)
        self.path.append(steps)
        moves = [*self.find_moves(*state)]
        if not moves and not self.is_right(*state):
            end = f'In the end: {dict(state[0])}, {state[2]}'
            sys.exit('\n'.join([f'WRONG: {self.scenario}', *tell(sum(self.path, [])), end]))
        for move in moves:
            if move[1] not in self.seen:
                self.visit(*move)
        self.path.pop()

    def find_moves(self, objects, deliveries, tally):
        """Yield the steps that may be taken next, and the state after them."""
        for one in dict.fromkeys(deliveries):
            place = deliveries.index(one)
            others = deliveries[:place] + deliveries[place + 1 :]
            for steps, after, then, later in self.choose(one, objects, tally):
                yield steps, (then, tuple(sorted(others + after)), later)
        # A pause outlasts what has begun, and the body. A part may be delivered after it.
        begun = [one for one in deliveries if one.answers or one.message[0] == 'body']
        if begun and all(one.step[0] == 'waits' for one in begun):
            after = [one.after('woken') for one in begun]
            others = [one for one in deliveries if one not in begun]
            yield [(begun, 'woken', after)], (objects, tuple(sorted(others + after)), tally)

    def find_choices(self, one, objects, tally):
        """As find_events(), but what nobody else notices follows at once, in no other order."""
        for event, after, *rest in self.find_events(one, objects, tally):
            step = ((one,), event, after)
            if after and after[0].step[0] in ('draws', 'sends', 'ends'):
                for steps, last, *rest_then in self.choose(after[0], *rest):
                    yield [step, *steps], last + after[1:], *rest_then
            else:
                yield [step], after, *rest

    def find_events(self, one, objects, tally):
        """Yield what may happen to this delivery, what is in its place then, objects and tally."""
        kind, key, *details = one.step
        keys, name = dict(objects), one.message[0]
        if kind == 'ends':
            yield 'done', (), objects, tally
        if kind == 'draws':
            nonces = tuple(sorted([*tally.nonces, name]))
            nonce = f'{name} {nonces.count(name)}'
            yield nonce, (one.after(nonce),), objects, tally._replace(nonces=nonces)
        if kind == 'sends':
            copies = self.scenario.parts.count(key) + (key == 'body' and not self.scenario.silent)
            after = (one.after(key), *[self.deliver(details[1])] * copies)
            sent = tally.sent + (key + details[0],) * (key in ENDS)
            yield 'done', after, objects, tally._replace(sent=sent)
        if kind in ('GET', 'PUT', 'DELETE'):
            answer, then = answer_as_s3(objects, *one.step)
            later = tally
            if then != objects and name == 'start' and tally.sent:  # it starts what has ended
                more = tally.more + (NOTE in key and key not in keys)
                later = tally._replace(more=more, stays=True)
            yield answer, (one.after(answer),), then, later
            if tally.lost and answer == b'':
                yield LOST, (one.after(LOST),), then, later._replace(lost=tally.lost - 1)
        # To die before a read is to die after the last write.
        is_mortal = one.answers and (name != 'start' or self.scenario.starts)
        if tally.deaths and is_mortal and kind not in ('GET', 'draws', 'raises'):
            has_sent = not {*ENDS}.isdisjoint(one.answers)
            is_shown = RESULT + 'body' in keys or RECORD not in str(keys)
            more = tally.more + (has_sent and self.scenario.silent and not is_shown)
            later = tally._replace(
                deaths=tally.deaths - 1, more=more, stays=tally.stays or has_sent
            )
            yield 'DIES', (self.deliver(one.message),), objects, later

    def is_right(self, objects, deliveries, tally):
        right = {part: f'result of {part}' for part in sorted(self.scenario.parts)}
        right['body'], call = 'result of body', f'body({list(right.values())},)'
        if self.scenario.failing:
            right[self.scenario.failing] = right['body'] = 'boom'
            call = "errback('body',)"
        elif self.scenario.silent:
            del right['body']
        left = dict(objects)
        are_stored = all(right[name] in str(left.pop(RESULT + name, '')) for name in right)
        is_sent = {*tally.sent} == {call} and len(tally.sent) <= 1 + tally.more
        return not deliveries and are_stored and is_sent and (tally.stays or not left)


def tell(steps):
    """Who took which step, and what happened then, a line each."""
    names, numbers = defaultdict(list), count(1)
    for before, event, after in steps:
        here = [names[one].pop() for one in before]
        for name, one in zip(here, before):
            yield f'{name} {" ".join(f"{part!s:.90}" for part in one.step)} -> {event!s:.90}'
        here += [f'{one.message[0]}{next(numbers)}' for one in after[len(before) :]]
        for name, one in zip(here, after):
            names[one].append(name)


APP = App(broker='memory://', set_as_current=False)
celery_s3.logger.disabled = True
celery_s3.Bucket._send_once, celery_s3.Bucket = send_once, lambda: deepcopy(BUCKET)
celery_s3.uuid = lambda: Delivery.running.ask('draws', 'a nonce')
celery_s3.time = SimpleNamespace(sleep=lambda s: s and Delivery.running.ask('waits', f'{s} s'))
searches = [(one, fates, order) for one in SCENARIOS for fates in one.fates for order in ORDERS]
deadline = time.monotonic() + float(sys.argv[2] if sys.argv[1:2] == ['--seconds'] else 300)
have_ended = True
for number, (scenario, fates, order) in enumerate(searches):
    celery_s3.random = SimpleNamespace(shuffle=ORDERS[order], uniform=lambda least, most: 0)
    began = time.monotonic()
    # Three shares of the time that is left, as the last ones take the longest.
    latest = min(began + 3 * (deadline - began) / (len(searches) - number), deadline)
    search = Search(scenario, fates.count('lost'), fates.count('dies'), latest)
    took = time.monotonic() - began
    has_ended = began + took < latest
    have_ended = have_ended and has_ended
    print(f'{scenario.name:32} {fates:9} {order:9} {len(search.seen):7} states', end='')
    print(
        f'{next(search.numbers):6} runs {took:6.1f} s', '' if has_ended else 'NOT ALL', flush=True
    )
sys.exit(not have_ended)
