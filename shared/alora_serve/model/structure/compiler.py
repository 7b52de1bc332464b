"""Compiles forms, each once a tenant: what is compiled is kept, and shared by all its answers of that form."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final, TypeVar

from llguidance import LLMatcher, LLParserLimits

from alora_serve.errors import AloraServeError
from alora_serve.kv.tenancy import NO_TENANT
from alora_serve.model.structure.forms import complaint, grammar_of, refusal
from alora_serve.model.structure.vocabulary import TokenVocabulary
from alora_serve.types import StructuredOutput

MAX_COMPILED: Final = 64
"""Forms kept. Each takes up to some tens of MB where it is as complex as the limits allow; usually well below one."""

STACK_BYTES: Final = 256 << 20
"""llguidance calls itself for each schema or rule within another. A form may hold more of them than a usual stack of
8 MiB takes, and the process would end. 64 MiB do for 128 KiB of references; memory is used as it is needed."""
_stack_size_lock: Final = threading.Lock()
_T = TypeVar("_T")

_LIMITS: Final = LLParserLimits(
    # The rest are llguidance's defaults, at which most forms compile within a second, and masks take no longer than
    # about 15 ms. States take 1 to 2 kB and are kept with the form.
    max_lexer_states=20_000,
    verbose_errors=False,
)


@dataclass(frozen=True, slots=True)
class CompiledForm:
    """A form that answers can be bound to."""

    form: StructuredOutput
    vocabulary: TokenVocabulary
    compiler: FormCompiler
    tenant_salt: bytes = field(repr=False)
    _prototype: LLMatcher

    def matcher(self) -> LLMatcher:
        """One that stands before the first token. Takes microseconds."""
        return self._prototype.deep_copy()

    def renewed(self) -> CompiledForm:
        """The same form, whose limits this one's answers have not used up: a later one that is there, or compiled anew.

        Limits count over all answers that share what is compiled.
        """
        return self.compiler.compile_after(self)

    def alone(self) -> CompiledForm:
        """The same form, compiled for one answer: it shares its limits with no other."""
        return self.compiler.compile_alone(self.form, self.tenant_salt)


class FormCompiler:
    """Compiles for one model. Thread-safe."""

    def __init__(self, vocabulary: TokenVocabulary) -> None:
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        self._compiled: OrderedDict[tuple[bytes, StructuredOutput], Future[CompiledForm]] = OrderedDict()

    def compile(self, form: StructuredOutput, tenant_salt: bytes = NO_TENANT) -> CompiledForm:
        """The form, compiled: at once if it was before, else in milliseconds, of the largest in a second.

        For each tenant anew: how soon it is there would tell one that another has asked for the same.

        Raises:
            InvalidRequestError: it is malformed, unsupported, too complex, or allows no answer; names the part.
            UnimplementedFeatureError: the model's tokenizer does not allow it.
        """
        with self._lock:
            key = tenant_salt, form
            known = self._compiled.get(key)
            compiled = known or Future()
            self._compiled[key] = compiled
            self._compiled.move_to_end(key)
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        if known is None:
            try:
                compiled.set_result(self.compile_alone(form, tenant_salt))
            except BaseException as error:  # noqa: BLE001  # whoever waits for it is told the same
                with self._lock:  # before it is told, so that no done future in the cache holds an error
                    self._compiled.pop(key, None)
                # A panic in Rust is no Exception, and would pass by everything that keeps a request's errors its own.
                compiled.set_exception(error if isinstance(error, Exception) else AloraServeError(repr(error)))
        return compiled.result()

    def compile_after(self, used_up: CompiledForm) -> CompiledForm:
        """As :meth:`compile`, but not this one, which is forgotten: whoever comes first compiles for all."""
        with self._lock:
            key = used_up.tenant_salt, used_up.form
            known = self._compiled.get(key)
            if known is not None and known.done() and known.result() is used_up:
                del self._compiled[key]
        return self.compile(used_up.form, used_up.tenant_salt)

    def compile_alone(self, form: StructuredOutput, tenant_salt: bytes = NO_TENANT) -> CompiledForm:
        """As :meth:`compile`, but for whoever asks alone, and not kept."""
        return _on_a_large_stack(lambda: self._compile(form, tenant_salt))

    def _compile(self, form: StructuredOutput, tenant_salt: bytes) -> CompiledForm:
        matcher = LLMatcher(self._vocabulary.tokens, grammar_of(form), log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise refusal(form, matcher.get_error())
        first = matcher.deep_copy()
        if not any(first.compute_bitmask()) or first.is_error():
            raise complaint(form, "it allows no answer")
        return CompiledForm(form, self._vocabulary, self, tenant_salt, matcher)


def _on_a_large_stack(call: Callable[[], _T]) -> _T:
    """Make a call in a thread of its own, and return what it does."""
    done = Future[_T]()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as error:  # noqa: BLE001  # whoever waits raises it
            done.set_exception(error)

    with _stack_size_lock:  # the size is the process's, of all threads to come
        usual = threading.stack_size(STACK_BYTES)
        try:
            threading.Thread(target=run, name="compile").start()
        finally:
            threading.stack_size(usual)
    return done.result()
