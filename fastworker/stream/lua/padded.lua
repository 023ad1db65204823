-- Ids that compare as text.
local function padded(id)
  local ms, seq = string.match(id, '^(%d+)-(%d+)$')
  return string.rep('0', 20 - #ms) .. ms .. '-' .. string.rep('0', 20 - #seq) .. seq
end
local function plain(id)
  return (string.gsub(string.gsub(id, '^0*(%d+-)', '%1'), '-0*(%d+)$', '-%1'))
end
