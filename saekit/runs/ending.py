"""The last thing that a run does: it says in its record how it ended, and leaves pictures of it."""

from __future__ import annotations

from types import TracebackType

import attrs

from saekit.errors import DivergedError, SaekitError
from saekit.reasons import error_text
from saekit.reports.pictures import Pictures, pictures_after
from saekit.runs.folder import Standing
from saekit.runs.record import RunRecord
from saekit.runs.session import Session
from saekit.values import RunEnd

__all__ = ["Ending", "end_of"]


def end_of(error: BaseException | None) -> RunEnd:
    """How a run has ended that ``error`` came out of."""
    if error is None:
        return RunEnd("finished")
    if isinstance(error, DivergedError):
        return RunEnd("diverged", error_text(error))
    return RunEnd("interrupted" if isinstance(error, KeyboardInterrupt) else "failed", error_text(error))


@attrs.define
class Ending:
    """What is done when the trackers are closed, however the run has ended; nothing of it is ever an error.

    Who leaves a context calls it with what was raised there, if anything was.
    """

    session: Session
    record: RunRecord
    standing: Standing
    pictures: Pictures = attrs.field(factory=lambda: Pictures({}))
    """Those that were drawn."""

    def __call__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        """Write and draw.  A Ctrl-C ends the drawing; of a run that was at its end, it is raised."""
        try:
            self.standing.check()  # nothing is written into a folder that is another by now
            end = end_of(error)
            if end.status == "interrupted":
                end = RunEnd("interrupted")  # what more there is to say is on the screen of whoever did it
            RunRecord.note_end(self.record.folder, end, self._diverged())
        except SaekitError:
            return
        members = self.session.members
        if end.status == "interrupted" and len(members) > 1:
            return  # whoever interrupts does not want to wait, and each SAE's pictures take a second
        if not next(iter(members.values())).config.reports.pictures:
            return
        self.session.say("drawing the pictures")
        try:
            self.pictures = pictures_after(self.record.folder)
        except KeyboardInterrupt as stop:
            if error is None:
                where = self.record.folder
                raise KeyboardInterrupt(f"the run in {where} is finished; its pictures were not drawn") from stop

    def _diverged(self) -> dict[str, str]:
        members = self.session.members
        return {name: m.trainer.diverged for name, m in members.items() if m.trainer.diverged is not None}
