from .attachment import Attachment as Attachment
from .attachment import attachments as attachments
from .doubts import doubts_of_fit as doubts_of_fit
from .doubts import model_name_of as model_name_of
from .fits import check_fits as check_fits
from .spliced import Intervention as Intervention
from .spliced import Spliced as Spliced
