from .attachment import Attachment as Attachment
from .attachment import Mask as Mask
from .attachment import attachments as attachments
from .context import splice as splice
from .spliced import Intervention as Intervention
from .spliced import Spliced as Spliced
