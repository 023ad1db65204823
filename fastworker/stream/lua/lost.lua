-- For scripts that find entries gone which nobody had settled: a reader of ours, which leaves a tail, reads them again from
-- the relay. One of another maker is told nothing, and nobody waits for it longer than a day.
local function lost(tail, request)
  if redis.call('EXISTS', tail) == 0 or redis.call('EXISTS', request) == 1 then return end
  -- mutant: what a dead consumer held and somebody trimmed is lost
  redis.call('SET', request, '{"lost":true,"seq":null,"relay":""}', 'EX', 86400)
end
