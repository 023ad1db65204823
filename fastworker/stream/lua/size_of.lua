-- For scripts that hand out entries: their bytes.
local function size_of(entries)
  local bytes = 0
  for _, entry in ipairs(entries) do
    if entry and entry[2] then
      for _, text in ipairs(entry[2]) do bytes = bytes + #text end
    end
  end
  return bytes
end
