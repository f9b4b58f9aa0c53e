"""A webhook that is called when runs fail, by an automation of Prefect.

The server itself makes the call, so a run whose process is gone is reported, too: a run that sends
no heartbeat for ten minutes counts as crashed. (So does a run on a machine that slept; when the
machine wakes, the run goes on.) Chats and mail gateways accept such calls. Other actions, such as
mail through your own server, can be added to the automation on its page.
"""

from datetime import timedelta
from typing import Any
from uuid import UUID

from prefect.automations import Automation
from prefect.blocks.webhook import Webhook
from prefect.events.actions import CallWebhook, ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.states import StateType

from pipelines.flows.flow import fuse_adapters

TELL = "meteora: tell of failures"
CRASHED = "meteora: runs that fell silent crashed"
SILENCE = timedelta(minutes=10)
"""Prefect's runs send a heartbeat every three minutes."""
ANY_RUN = ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"})
OURS = ResourceSpecification(
    {"prefect.resource.role": "flow", "prefect.resource.name": fuse_adapters.name}
)
"""Matches by the flow: a run's events lack tags that were added after its start."""
ENDS = ("Completed", "Failed", "Cancelled", "Crashed")

MESSAGE = """\
{"text": {{ ("meteora: " ~ flow_run.name ~ " " ~ flow_run.state.name ~ ". "
             ~ (flow_run.state.message or "")) | tojson }},
 "page": {{ flow_run | ui_url | tojson }}}"""


def call_on_failure(url: str) -> None:
    """Make the server call `url` with {"text": …, "page": …} when a run fails or crashes.

    The page is null if the server does not know its own address (`PREFECT_UI_URL`). A server calls
    one URL: another call of this function replaces it.
    """
    block = Webhook(method="POST", url=url, headers={"Content-Type": "application/json"})
    block_id: UUID = block.save("meteora-failures", overwrite=True)  # ty: ignore[invalid-assignment]  (no coroutine, outside a loop)
    _put(
        TELL,
        "Calls a webhook when a run fails or crashes.",
        CallWebhook(block_document_id=block_id, payload=MESSAGE),
        posture=Posture.Reactive,
        expect={"prefect.flow-run.Failed", "prefect.flow-run.Crashed"},
        within=timedelta(0),
    )
    silent = "it has sent no heartbeat for ten minutes"
    _put(
        CRASHED,
        "Marks runs as crashed whose process is gone.",
        ChangeFlowRunState(state=StateType.CRASHED, message=silent),
        posture=Posture.Proactive,
        after={"prefect.flow-run.heartbeat"},
        expect={"prefect.flow-run.heartbeat", *(f"prefect.flow-run.{end}" for end in ENDS)},
        within=SILENCE,
    )


def _put(
    name: str,
    description: str,
    action: CallWebhook | ChangeFlowRunState,
    **events: Any,  # noqa: ANN401
) -> None:
    """Create an automation for `events` of runs, or replace the one of its name."""
    trigger = EventTrigger(
        match=ANY_RUN, match_related=OURS, for_each={"prefect.resource.id"}, threshold=1, **events
    )
    automation = Automation(name=name, description=description, trigger=trigger, actions=[action])
    try:
        there: Automation = Automation.read(name=automation.name)  # ty: ignore[invalid-assignment]  (nor here)
    except ValueError:  # Prefect's error if there is none
        automation.create()
    else:
        automation.id = there.id
        automation.update()
