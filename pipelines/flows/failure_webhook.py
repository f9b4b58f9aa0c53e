"""Who is told when runs fail: a webhook, called by an automation of Prefect's.

The server itself calls it, so it is told of a run whose process is gone, too: a run that sends no
heartbeat for ten minutes is taken for crashed. (One that slept with its machine is, too; when it
wakes it goes on, and ends as it ends.) Chats and mail gateways take such calls; any other
action, such as mail through a server of one's own, is added to the automation on its page.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from prefect.automations import Automation
from prefect.blocks.webhook import Webhook
from prefect.events.actions import CallWebhook, ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.states import StateType

from pipelines.flows.flow import fuse_adapters

if TYPE_CHECKING:
    from uuid import UUID

TELL = "meteora: tell of failures"
CRASHED = "meteora: runs that fell silent crashed"
SILENCE = timedelta(minutes=10)
"""Prefect's runs send a heartbeat every three minutes."""
ANY_RUN = ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"})
OURS = ResourceSpecification(
    {"prefect.resource.role": "flow", "prefect.resource.name": fuse_adapters.name}
)
"""By its flow: a run's events know no tags that were given to it after it began."""
ENDS = ("Completed", "Failed", "Cancelled", "Crashed")

MESSAGE = """\
{"text": {{ ("meteora: " ~ flow_run.name ~ " " ~ flow_run.state.name ~ ". "
             ~ (flow_run.state.message or "")) | tojson }},
 "page": {{ flow_run | ui_url | tojson }}}"""


def tell(url: str) -> None:
    """Have `url` called with {"text": …, "page": …} whenever a run fails or crashes.

    The page is null where a server has not been told its own address (`PREFECT_UI_URL`).

    Doing so again replaces what was said before: a server tells one address.
    """
    block = Webhook(method="POST", url=url, headers={"Content-Type": "application/json"})
    block_id: UUID = block.save("meteora-failures", overwrite=True)  # ty: ignore[invalid-assignment]  (no coroutine, outside a loop)
    _put(
        Automation(
            name=TELL,
            description="Calls a webhook when a run fails or crashes.",
            trigger=EventTrigger(
                posture=Posture.Reactive,
                expect={"prefect.flow-run.Failed", "prefect.flow-run.Crashed"},
                match=ANY_RUN,
                match_related=OURS,
                for_each={"prefect.resource.id"},
                threshold=1,
                within=timedelta(0),
            ),
            actions=[CallWebhook(block_document_id=block_id, payload=MESSAGE)],
        )
    )
    _put(
        Automation(
            name=CRASHED,
            description="Marks runs as crashed whose process is gone.",
            trigger=EventTrigger(
                posture=Posture.Proactive,
                after={"prefect.flow-run.heartbeat"},
                expect={
                    "prefect.flow-run.heartbeat",
                    *(f"prefect.flow-run.{end}" for end in ENDS),
                },
                match=ANY_RUN,
                match_related=OURS,
                for_each={"prefect.resource.id"},
                threshold=1,
                within=SILENCE,
            ),
            actions=[
                ChangeFlowRunState(
                    state=StateType.CRASHED, message="it has sent no heartbeat for ten minutes"
                )
            ],
        )
    )


def _put(automation: Automation) -> None:
    try:
        there: Automation = Automation.read(name=automation.name)  # ty: ignore[invalid-assignment]  (nor here)
    except ValueError:  # so it says that there is none
        automation.create()
    else:
        automation.id = there.id
        automation.update()
