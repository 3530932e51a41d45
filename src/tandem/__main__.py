from tandem.cli import main
from tandem.world import end

end(main())
